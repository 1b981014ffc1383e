"""Floor 4: modules, injection, merging, saving."""

from glora_kernels.nn.adapter import load_adapter, save_adapter
from glora_kernels.nn.inject import inject
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import disabled, merge, trainable_parameters, unmerge
from glora_kernels.nn.warmup import warmup

__all__ = [
    "GLoRALinear",
    "disabled",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
    "warmup",
]
