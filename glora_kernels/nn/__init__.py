"""Modules, injection, merging, saving."""

from glora_kernels.nn.adapter import load_adapter
from glora_kernels.nn.convolutions.layer import GLoRAConv
from glora_kernels.nn.depth import deferred_shared_grads, shift_once
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.fuse import FusedReport, fuse_cross_attention, fuse_siblings, split_siblings
from glora_kernels.nn.grouped import GroupedLoRALinear
from glora_kernels.nn.inject import inject
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.merging.models import disabled, merge, merge_and_unload, unload, unmerge
from glora_kernels.nn.merging.rounding import MergeReport
from glora_kernels.nn.model import trainable_parameters
from glora_kernels.nn.quantize import quantize
from glora_kernels.nn.saving import save_adapter
from glora_kernels.nn.several import adapters, add_adapter, delete_adapter, rows, set_adapter
from glora_kernels.nn.sharded import clip_grad_norm_, fully_shard, parameter_groups
from glora_kernels.nn.share import shared
from glora_kernels.nn.warmup import warmup

__all__ = [
    "FusedReport",
    "GLoRAConv",
    "GLoRALinear",
    "GroupedLoRALinear",
    "MergeReport",
    "QuantizedLinear",
    "adapters",
    "add_adapter",
    "clip_grad_norm_",
    "deferred_shared_grads",
    "delete_adapter",
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
    "rows",
    "save_adapter",
    "set_adapter",
    "shared",
    "shift_once",
    "split_siblings",
    "trainable_parameters",
    "unload",
    "unmerge",
    "warmup",
]
