"""GLoRA and LoRA fine-tuning layers at close to the cost of the frozen layer.

Importing the package touches no GPU and loads no kernel.
"""

from glora_kernels import parallel
from glora_kernels.integrations import AccelerationReport, accelerate, acceleration, decelerate
from glora_kernels.methods import *  # noqa: F403 (what methods lists as public)
from glora_kernels.methods import __all__ as _of_methods
from glora_kernels.nn import *  # noqa: F403 (what nn lists as public)
from glora_kernels.nn import __all__ as _of_nn
from glora_kernels.runtime.routes import backend, batch_invariant
from glora_kernels.search import Search, SearchSpace, Supernet
from glora_kernels.spec import GLoRAConfig, ShareLoRAConfig

__all__ = [
    "AccelerationReport",
    "GLoRAConfig",
    "Search",
    "SearchSpace",
    "ShareLoRAConfig",
    "Supernet",
    "__version__",
    "accelerate",
    "acceleration",
    "backend",
    "batch_invariant",
    "decelerate",
    "parallel",
]
__all__ += [*_of_methods, *_of_nn]

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: the installed metadata is its one source."""
    if name == "__version__":
        from importlib.metadata import version

        return version("glora_kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
