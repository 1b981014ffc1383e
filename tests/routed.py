"""Experts to try `ops.expert_glora_linear` on, and what its results must be: each row by the letter, by its expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import literal
from torch import Tensor

from glora_kernels import reference
from glora_kernels.ops import expert_glora_linear
from glora_kernels.quant import QuantizedWeight, dequantize
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.spec import GLoRAConfig


@dataclass
class Routed:
    """The operands of one call. adapters: by the names of a layer's parameters, with E in front.

    index: the experts of each token (T, k); or sorted: the experts of the rows (M,), those without one behind.
    """

    x: Tensor
    weight: Any
    bias: Tensor | None
    config: GLoRAConfig
    adapters: dict[str, Tensor]
    seed: Tensor
    index: Tensor
    dy: Tensor
    is_sorted: bool = False

    @property
    def experts(self) -> int:
        return next(iter(self.adapters.values())).shape[0] if self.adapters else self.weight.shape[0]

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "bias": self.bias, **self.adapters}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def call(self) -> Tensor:
        own: dict[str, Any] = {name.lower(): t for name, t in self.adapters.items()}
        own |= {"scale": self.config.scale, "variant": self.config.variant}
        if self.drops:
            own |= {"dropout_p": self.config.dropout, "seed": self.seed}
        if not self.is_sorted:
            return expert_glora_linear(self.x, self.weight, self.bias, own, index=self.index)
        ends = torch.searchsorted(self.index, torch.arange(self.experts, device=self.index.device), right=True)
        return expert_glora_linear(self.x, self.weight, self.bias, own, offsets=ends)

    @property
    def drops(self) -> bool:
        return self.config.dropout > 0 and self.config.B == "lora"

    def ours(self) -> dict[str, Tensor]:
        """y and every gradient."""
        leaves = self.leaves()
        y = self.call()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.view_as(y)) if leaves else []
        return {"y": y.detach().view_as(self.dy), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}

    def literal(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By the letter, of the same numbers in another dtype."""
        copies = {name: leaf.detach().cpu().to(dtype).requires_grad_() for name, leaf in self.leaves().items()}

        def own(name: str, tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copies.get(name, tensor.detach().cpu().to(dtype))

        x, bias = own("x", self.x), own("bias", self.bias)
        adapters = {name: own(name, t) for name, t in self.adapters.items()}
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            weight = dequantize(weight, self.x.dtype).view(self.experts, -1, self.x.shape[1])
        weight = weight.detach().cpu().to(dtype)
        keep = reference.keep_mask(self.seed.cpu(), *x.shape, self.config.dropout) if self.drops else None
        experts, rows = self.index.cpu().reshape(-1), []
        token = torch.arange(len(experts)) // (len(experts) // max(1, len(x)) or 1)
        y = x.new_zeros(len(experts), weight.shape[1])
        for e in range(self.experts):
            at = (experts == e).nonzero().squeeze(1)
            rows = token[at]
            mine = {name: t[e] for name, t in adapters.items()}
            made = literal(
                x[rows], weight[e], None if bias is None else bias[e], mine, self.config,
                None if keep is None else keep[rows],
            )  # fmt: skip
            y = y.index_copy(0, at, made)
        leaves = list(copies.values())
        grads = torch.autograd.grad(y, leaves, self.dy.cpu().to(dtype), allow_unused=True) if leaves else []
        found = {
            f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(copies.items(), grads, strict=True)
        }
        return {"y": y.detach(), **found}

    def check(self, found: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Against float64, as near as the literal computation in `dtype`."""
        truth, plain = self.literal(torch.float64), self.literal(dtype)
        assert found.keys() == truth.keys()
        for name, value in found.items():
            exact = truth[name]
            allowed = allowed_error(exact, plain[name], dtype, float(exact.abs().max()) if exact.numel() else 0.0)
            assert value.shape == exact.shape, name
            assert largest_error(value.cpu(), exact) <= allowed, name

    def on(self, device: str) -> Routed:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        return replace(
            self, x=moved(self.x), weight=moved(self.weight), bias=None if self.bias is None else moved(self.bias),
            adapters={name: moved(t) for name, t in self.adapters.items()}, index=moved(self.index), dy=moved(self.dy),
        )  # fmt: skip


def routed(
    config: GLoRAConfig, index: Tensor, experts: int = 5, k: int = 24, n: int = 20, bias: bool = False,
    dtype: torch.dtype = torch.float32, adapters: torch.dtype | None = None, is_sorted: bool = False, size: float = 0.3,
) -> Routed:  # fmt: skip
    """Random operands, all trained. index: as in `Routed`."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, std: float = 1.0, own: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(own)

    made = {
        name: draw(experts, *shape, std=size, own=adapters or dtype).requires_grad_()
        for name, shape in config.parameter_shapes(k, n, bias).items()
    }
    return Routed(
        draw(len(index), k).requires_grad_(), draw(experts, n, k, std=k**-0.5),
        draw(experts, n).requires_grad_() if bias else None, config, made, torch.tensor([0x1234_5678_9ABC_DEF]),
        index, draw(index.numel(), n), is_sorted,
    )  # fmt: skip


RAGGED = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3], [0, 3], [3, -1], [1, 0], [3, 7], [0, 1]])
"""Experts 2 and 4 have no row, and two rows have no expert."""
