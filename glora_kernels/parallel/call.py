"""One call of a layer whose parameters are cut over the ranks of a mesh: `ops.glora_linear` on this rank's parts.

    column:  x whole, y_p = x·W_eff,pᵀ + β_p: this rank's columns of y
    row:     y = Σ_p y_p,  y_p = x_p·W_eff,pᵀ + W_p·C_p + [p = 0]·(b + b∘D + E)

x and y are DTensors, which the hooks of the style turn into local tensors. DTensor sums dx of a column layer and y of a
row layer over the ranks, as it does for the frozen layer. The sum is out of place: the operator keeps its own y, from
which it computes the gradient of a vector A.

b, D and E of a row layer are in the operator of the first rank, so that in 16 bits y_0 is rounded once, with the dither
that keeps small terms; added after the sum, most of a small E would be rounded away.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from glora_kernels.dispatch.common import Weight
from glora_kernels.glora.call import Supports, shift
from glora_kernels.glora.op import dropout_seed
from glora_kernels.nn.adapted import Operands, adapted_linear, base_linear
from glora_kernels.ops import glora_linear
from glora_kernels.parallel.layout import COLUMN, ONCE, ROW, cut_dim
from glora_kernels.quant import QuantizedWeight
from glora_kernels.spec import GLoRAConfig


class Cut:
    """How a layer is cut over a mesh, and its calls. One that several layers or copies of a model refer to is shared.

    Attributes:
        mesh: the ranks, 1-D.
        direction: COLUMN or ROW.
    """

    def __init__(self, mesh: DeviceMesh, direction: str) -> None:
        self.mesh, self.direction = mesh, direction

    def __deepcopy__(self, memo: object) -> Cut:
        return self

    @property
    def is_first(self) -> bool:
        return self.mesh.get_local_rank() == 0

    def placement(self, name: str, config: GLoRAConfig, transposed: bool = False) -> Replicate | Shard:
        """How the mesh holds a parameter of a layer with this configuration."""
        dim = cut_dim(self.direction, name, config, transposed)
        return Replicate() if dim is None else Shard(dim)

    def linear(
        self, x: Tensor, base: tuple[Weight, Tensor | None, torch.dtype | None], config: GLoRAConfig | None,
        tensors: Mapping[str, Tensor | None], training: bool,
    ) -> Tensor:  # fmt: skip
        """y, a DTensor, of an x that is one. config None: the base alone.

        Raises:
            TypeError: x is no DTensor: the layer was called without the hooks of its style.
        """
        local = self._entering(x)
        weight, bias, compute_dtype = base
        if not isinstance(weight, QuantizedWeight):
            weight = _part(weight)
        own = {name: self._own(name, tensor, config) for name, tensor in tensors.items()}
        bias = self._own("bias", bias, config)
        if config is None:
            y = base_linear(local, (weight, bias if self.direction == COLUMN or self.is_first else None, compute_dtype))
            return self._leaving(y)
        if self.direction == ROW:
            bias, own = self._once(bias, own, local.dtype if compute_dtype is None else compute_dtype)
        operands = Operands.of(config, own, training)  # type: ignore[arg-type]
        seed, linear = None, glora_linear
        if operands.dropout_p:
            seed = self._seed(local.device)
            if self.direction == ROW:
                linear = partial(glora_linear, columns_before=self.mesh.get_local_rank() * local.shape[-1])
        return self._leaving(adapted_linear(local, (weight, bias, compute_dtype), operands, seed, linear))

    def _own(self, name: str, tensor: Tensor | None, config: GLoRAConfig | None) -> Tensor | None:
        """This rank's part of a bias or of an adapter's parameter; what gradients of it mean is in the table."""
        if tensor is None:
            return None
        summed = not (self.direction == ROW and name in ONCE)
        if config is None or cut_dim(self.direction, name, config) is not None:
            summed = False
        return _part(tensor, summed)

    def _once(
        self, bias: Tensor | None, own: dict[str, Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """The bias and adapter of a row layer as its operator takes them: b + b∘D + E as one term, the first rank's."""
        d, e = own.get("D"), own.get("E")
        if d is None and e is None and (bias is None or not bias.requires_grad):
            return bias if self.is_first else None, own
        once = shift(Supports(bias=bias, d=d, e=e), dtype)
        return None, {**own, "D": None, "E": _OnFirst.apply(once, self.is_first)}

    def _entering(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            raise TypeError(
                f"this layer is cut over {self.mesh.size()} ranks ({self.direction}s) and takes a DTensor, which the "
                f"hooks of its parallel style make, got a {type(x).__name__}: mixed Tensor and DTensor. Call the "
                "module, not its forward; if its hooks were removed, apply GLoRAColwise or GLoRARowwise again"
            )
        wanted = Replicate() if self.direction == COLUMN else Shard(x.ndim - 1)
        if x.placements != (wanted,):
            x = x.redistribute(placements=(wanted,))
        return x.to_local(grad_placements=(Partial(),)) if self.direction == COLUMN else x.to_local()

    def _leaving(self, y: Tensor) -> Tensor:
        placement = Shard(y.ndim - 1) if self.direction == COLUMN else Partial()
        return DTensor.from_local(y, self.mesh, (placement,), run_check=False)

    def _seed(self, device: torch.device) -> Tensor:
        """The key of the mask, the same on every rank: each draws it from its own generator."""
        seed = dropout_seed(device)
        group = self.mesh.get_group()
        if group not in _CHECKED and not torch.compiler.is_compiling():
            both = torch.cat((seed, -seed)).to(self.mesh.device_type)
            dist.all_reduce(both, dist.ReduceOp.MAX, group)
            if int(both[0]) != -int(both[1]):
                raise RuntimeError(
                    "the ranks of one tensor-parallel group drew different dropout masks, which together are none: "
                    "seed them alike, torch.manual_seed(seed + the rank in the data-parallel dimension) say"
                )
            _CHECKED.add(group)
        return seed


_CHECKED: set[Any] = set()
"""The process groups whose ranks were once seen to draw the same dropout seed."""


def _part(tensor: Tensor, summed: bool = False) -> Tensor:
    """This rank's part; `summed`: its gradient is a part of a sum over the ranks, which DTensor adds up later."""
    if not isinstance(tensor, DTensor):
        raise TypeError(
            "a parameter of this layer is a plain tensor beside DTensors, each rank would train its own: apply "
            "GLoRAColwise or GLoRARowwise to the layer after the parameter was replaced"
        )
    if tensor.device_mesh.ndim != 1:
        raise RuntimeError(
            "this layer was called while FSDP holds its parameters in parts; call the model, whose blocks gather them"
        )
    return tensor.to_local(grad_placements=(Partial(),) if summed else None)


class _OnFirst(torch.autograd.Function):
    """A tensor on the first rank, zeros on the others. dy is whole on every rank, and so is this gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, is_first: bool) -> Tensor:
        return tensor.view_as(tensor) if is_first else torch.zeros_like(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
