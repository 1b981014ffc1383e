"""GLoRA and LoRA fine-tuning layers at the cost of a frozen linear layer.

Importing the package touches no GPU and loads no kernel.
"""

from glora_kernels.launch.routes import backend
from glora_kernels.nn import (
    GLoRALinear,
    disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
    unmerge,
    warmup,
)
from glora_kernels.spec import GLoRAConfig

__all__ = [
    "GLoRAConfig",
    "GLoRALinear",
    "__version__",
    "backend",
    "disabled",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
    "warmup",
]

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: the installed metadata is its one source."""
    if name == "__version__":
        from importlib.metadata import version

        return version("glora_kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
