"""GLoRA and LoRA fine-tuning layers at the cost of a frozen linear layer.

Importing the package touches no GPU and loads no kernel.
"""

from glora_kernels.integrations import AccelerationReport, accelerate, acceleration, decelerate
from glora_kernels.nn import (
    FusedReport,
    GLoRALinear,
    GroupedLoRALinear,
    MergeReport,
    QuantizedLinear,
    clip_grad_norm_,
    deferred_shared_grads,
    disabled,
    fully_shard,
    fuse_cross_attention,
    fuse_siblings,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    parameter_groups,
    quantize,
    save_adapter,
    shared,
    shift_once,
    split_siblings,
    trainable_parameters,
    unmerge,
    warmup,
)
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig, ShareLoRAConfig

__all__ = [
    "AccelerationReport",
    "FusedReport",
    "GLoRAConfig",
    "GLoRALinear",
    "GroupedLoRALinear",
    "MergeReport",
    "QuantizedLinear",
    "ShareLoRAConfig",
    "__version__",
    "accelerate",
    "acceleration",
    "backend",
    "clip_grad_norm_",
    "decelerate",
    "deferred_shared_grads",
    "disabled",
    "fully_shard",
    "fuse_cross_attention",
    "fuse_siblings",
    "inject",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "parameter_groups",
    "quantize",
    "save_adapter",
    "shared",
    "shift_once",
    "split_siblings",
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
