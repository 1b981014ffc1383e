"""Experts to try `ops.expert_glora_linear` on, and what its results must be: the equation, row by row, in float64.

y[i] = x[token(i)] (W_e + W_e∘A_e)ᵀ + s·x̃[token(i)] B_eᵀ + bias_e + bias_e∘D_e + E_e + W_e·C_e,   e the expert of row i
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glora_kernels.ops import expert_glora_linear
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.reference.random import keep_mask
from glora_kernels.reference.tolerance import judge, largest_error, unlucky_error
from glora_kernels.spec import GLoRAConfig

INDEX = [[0, 3], [3, -1], [3, 0], [9, 3], [0, 3], [3, 2], [2, 0]]
"""The experts of seven tokens, of four: none for 1, two rows that have none, and one token twice with the same."""
OFFSETS = [3, 3, 5, 11]
"""Of 14 rows: none for 1, and three behind the last."""

FORMS = {
    "LoRA": GLoRAConfig.lora(3, 6.0),
    "A vector, B lora, C, D, E": GLoRAConfig("vector", "lora", "vector", "vector", "vector", 5, 2.0),
    "A constant, B vector, C lora": GLoRAConfig("constant", "vector", "lora", "constant", "constant", 2),
    "A lora, B lora": GLoRAConfig("lora", "lora", "none", "none", "vector", 2, 4.0),
    "A lora, B constant, C lora": GLoRAConfig("lora", "constant", "lora", "vector", "none", 1),
    "product variant": GLoRAConfig("lora", "lora", "vector", "none", "none", 3, 2.0, variant="matmul"),
    "base": GLoRAConfig("none", "none", "none", "none", "none"),
}
BIG = {name: own for name, own in FORMS.items() if name not in ("base", "A lora, B constant, C lora")}
"""Forms that differ in what they take and keep."""


@dataclass
class Problem:
    """The operands of one call."""

    config: GLoRAConfig
    x: Tensor
    weight: Any
    bias: Tensor | None
    adapters: dict[str, Tensor]
    where: dict[str, Tensor]
    dy: Tensor
    seed: Tensor

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, **({} if self.bias is None else {"bias": self.bias}), **self.adapters}

    def call(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        own = {**self.leaves(), **(leaves or {})}
        numbers: dict[str, Any] = {"scale": self.config.scale, "variant": self.config.variant}
        if self.config.dropout:
            numbers |= {"dropout_p": self.config.dropout, "seed": self.seed}
        adapters = {name: own[name] for name in self.adapters}
        return expert_glora_linear(own["x"], self.weight, own.get("bias"), {**adapters, **numbers}, **self.where)

    def ours(self, run: Callable[[dict[str, Tensor]], Tensor] | None = None) -> dict[str, Tensor]:
        """y and the gradient of every leaf."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.leaves().items()}
        y = (run or self.call)(leaves)
        found = torch.autograd.grad(y, [*leaves.values()], self.dy.view_as(y).to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}

    def owners(self) -> list[tuple[int, int]]:
        """The token and the expert of each row of y."""
        if "index" in self.where:
            each = self.where["index"][0].numel() if len(self.x) else 1
            return [(row // each, e) for row, e in enumerate(self.where["index"].flatten().tolist())]
        ends = self.where["offsets"].tolist()
        return [(row, sum(end <= row for end in ends)) for row in range(len(self.x))]

    def experts(self) -> int:
        return len(self.weight) if isinstance(self.weight, Tensor) else len(self.where.get("offsets", self.bias))

    def literal(
        self, dtype: torch.dtype = torch.float64, power: int = 1, dy: Tensor | None = None
    ) -> dict[str, Tensor]:
        """y and all gradients in a dtype, or those of every number to a power."""
        leaves = {name: (t.detach().to(dtype) ** power).requires_grad_() for name, t in self.leaves().items()}
        weight = self.weight if isinstance(self.weight, Tensor) else dequantize(self.weight, torch.float64)
        weight = weight.reshape(self.experts(), -1, self.x.shape[-1]).to(dtype) ** power
        c, s, rest = self.config, self.config.scale**power, 1.0 / (1.0 - self.config.dropout) ** power
        x, kept = leaves["x"], leaves["x"]
        if c.dropout:
            kept = x * keep_mask(self.seed, *x.shape, c.dropout) * rest

        def one(token: int, e: int) -> Tensor:
            if not 0 <= e < len(weight):
                return x.new_zeros(weight.shape[1])
            w, p = weight[e], {name: t[e if len(t) > 1 else 0] for name, t in leaves.items() if name != "x"}
            b = p["bias"] if self.bias is not None else torch.zeros(len(w), dtype=dtype)
            effective, shift = w, b
            if c.A == "lora":
                a = p["a_up"] @ p["a_down"]
                effective = w + (w @ a if c.variant == "matmul" else w * a)
            elif c.A != "none":
                effective = w + w * p["a"][:, None]
            if c.B in ("vector", "constant"):
                effective = effective + p["b"][:, None]
            if c.D != "none" and self.bias is not None:
                shift = shift + b * p["d"]
            if c.E != "none":
                shift = shift + p["e"]
            if c.C != "none":
                shift = shift + w @ (p["c"] if c.C == "vector" else (p["c_up"] @ p["c_down"])[:, 0])
            y = effective @ x[token] + shift
            return y + s * (p["b_up"] @ p["b_down"]) @ kept[token] if c.B == "lora" else y

        rows = [one(token, e) for token, e in self.owners()]
        dy = (self.dy if dy is None else dy).to(dtype) ** power
        y = torch.stack([*rows, x.sum() * dy.new_zeros(weight.shape[1])])[:-1].view(dy.shape)
        found = torch.autograd.grad(y, [*leaves.values()], dy, allow_unused=True, materialize_grads=True)
        return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}

    def exact(self, found: dict[str, Tensor], tolerance: float = 1e-12) -> None:
        """In float64: but for the order of sums, the letter."""
        for name, value in self.literal().items():
            got = found[name]
            assert (got.shape, got.dtype) == ((value.shape, torch.float64) if name != "y" else (got.shape, got.dtype))
            size = max(1.0, float(value.abs().max()) if value.numel() else 0.0)
            assert largest_error(got.view(value.shape), value) <= tolerance * size, (name, self.config)

    def check(self, found: dict[str, Tensor], dtype: torch.dtype) -> None:
        """As near to float64 as the letter in `dtype`."""
        truth, plain, squares = self.literal(), self.literal(dtype), self.literal(power=2)

        def unlucky(name: str) -> float:
            def of(dy: Tensor) -> float:
                return largest_error(self.literal(dtype, dy=dy)[name], self.literal(dy=dy)[name])

            return unlucky_error(self.dy, of)

        eps, faults = torch.finfo(dtype).eps, []
        for name, value in truth.items():
            got = found[name].view(value.shape)
            assert got.dtype == (dtype if name == "y" else self.leaves()[name].dtype), name
            terms = squares[name].sqrt()
            for norm, error, allowed in judge(got, value, plain[name], terms, eps, lambda name=name: unlucky(name)):
                if not error <= allowed:
                    faults.append(f"{name} ({norm}): {error:.3e} over {allowed:.3e}")
        assert not faults, f"{self.config}: " + "; ".join(faults)


def problem(
    config: GLoRAConfig, *, index: Any = None, offsets: Any = None, experts: int = 4, n: int = 11, k: int = 20,
    bias: bool = True, dtype: torch.dtype = torch.float64, adapters: torch.dtype | None = None,
    shared: tuple[str, ...] = (), size: float = 0.3, quant: dict[str, Any] | None = None, seed: int = 0,
) -> Problem:  # fmt: skip
    """Random operands; seven tokens of two experts where neither an index nor offsets and a number of rows are given.

    shared: the adapters that all experts share. quant: the arguments of `quantize_weight`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, own: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(own)

    if offsets is None:
        where = {"index": torch.as_tensor(INDEX if index is None else index, dtype=torch.int64)}
        tokens, rows = len(where["index"]), where["index"].shape
    else:
        where = {"offsets": torch.tensor(offsets[0])}
        tokens, rows = offsets[1], (offsets[1],)
    weight: Any = draw(experts, n, k, std=k**-0.5)
    if quant is not None:
        weight = quantize_weight(weight.view(experts * n, k).float(), **quant)
    own = {
        name.lower(): draw(1 if name.lower() in shared else experts, *shape, std=size, own=adapters or dtype)
        for name, shape in config.parameter_shapes(k, n, bias).items()
    }
    return Problem(
        config, draw(tokens, k), weight, draw(experts, n, std=0.5) if bias else None, own, where, draw(*rows, n),
        torch.tensor([0x1234_5678_9ABC_DEF + seed]),
    )  # fmt: skip
