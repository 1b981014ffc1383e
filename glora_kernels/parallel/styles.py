"""The parallel styles of GLoRA layers, for plans of `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.parallel.attach import attach
from glora_kernels.parallel.layout import COLUMN, ROW


class GLoRAColwise(ColwiseParallel):
    """`ColwiseParallel` that takes GLoRA layers too: y = x·W_effᵀ + β cut along its columns, the rows of W.

    The parameters become DTensors: A, B, D and E as vectors, A_up, B_up and the bias are cut as the rows of W are; the
    others are whole on every rank, and their gradients are added up over the ranks before a step. Forward has no
    collective, backward the sum of dx (M, K) that the frozen layer has.

    Args:
        input_layouts, output_layouts, use_local_output: those of `ColwiseParallel`.

    Raises (in `parallelize_module`):
        ValueError: out_features that the mesh does not divide; 4-bit codes that cannot be cut; a factor shared with a
            layer that is cut in another way; fused siblings; further adapters. The layer is unchanged.
        RuntimeError: the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, GLoRALinear):
            _check_plain(module)
            return super()._apply(module, device_mesh)
        return _applied(self, module, device_mesh, COLUMN)


class GLoRARowwise(RowwiseParallel):
    """`RowwiseParallel` that takes GLoRA layers too: y = Σ_p x_p·W_eff,pᵀ + β, x and the columns of W cut.

    The parameters become DTensors: A_down, B_down, and C as a vector or C_up, are cut as the columns of W are; the
    others are whole on every rank. b, D and E are added by the first rank, before the sum. Forward has the sum of y
    (M, N) that the frozen layer has, backward no collective; the gradients of A_up, B_up and of vectors and constants A
    and B are added up over the ranks before a step. Dropout draws each rank's columns of one mask.

    Args:
        input_layouts, output_layouts, use_local_output: those of `RowwiseParallel`.

    Raises (in `parallelize_module`):
        ValueError: in_features that the mesh does not divide; A=lora in the product variant; and what `GLoRAColwise`
            refuses. The layer is unchanged.
        RuntimeError: the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, GLoRALinear):
            _check_plain(module)
            return super()._apply(module, device_mesh)
        return _applied(self, module, device_mesh, ROW)


def _check_plain(module: nn.Module) -> None:
    if isinstance(module, QuantizedLinear):
        raise ValueError(
            "a 4-bit layer without an adapter cannot be cut over ranks: adapt it too (target_modules in inject), or "
            "leave it out of the plan or of quantize()"
        )


def _applied(
    style: ColwiseParallel | RowwiseParallel, layer: GLoRALinear, mesh: DeviceMesh, direction: str
) -> nn.Module:  # fmt: skip
    if not layer.is_linear:
        raise ValueError(
            f"a {type(layer).__name__} cannot be cut over ranks, only a linear layer; leave it out of the plan"
        )
    attach(layer, mesh, direction, src_data_rank=style.src_data_rank)
    style.desired_input_layouts = (Replicate(),) if direction == COLUMN else (Shard(-1),)
    return distribute_module(
        layer, mesh, None,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )  # fmt: skip
