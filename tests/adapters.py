"""Many adapters over one base to try `ops.multi_glora_linear` on, and what its results must be.

The results of a call are those of a loop: each adapter's rows by themselves through the operator of a single layer
(`loop`), or by the letter (`literal`), put back in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers import literal
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels import reference
from glora_kernels.ops import glora_linear, multi_glora_linear
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.spec import GLoRAConfig


@dataclass
class Mixed:
    """The operands of one call. `adapters`: by the names of a layer's parameters; an entry may be in several."""

    x: Tensor
    weight: Any
    bias: Tensor | None
    configs: list[GLoRAConfig]
    adapters: list[dict[str, Tensor]]
    seeds: list[Tensor]
    rows: Tensor
    dy: Tensor
    lengths: list[int] | None = None

    def leaves(self) -> dict[str, Tensor]:
        """What wants a gradient, each tensor once."""
        named = {"x": self.x, "bias": self.bias}
        named |= {f"{j}.{name}": t for j, own in enumerate(self.adapters) for name, t in own.items()}
        found: dict[str, Tensor] = {}
        for name, tensor in named.items():
            if tensor is not None and tensor.requires_grad and not any(tensor is known for known in found.values()):
                found[name] = tensor
        return found

    def keywords(self, j: int) -> dict[str, Any]:
        """Adapter j as keyword arguments of the operators."""
        config = self.configs[j]
        own: dict[str, Any] = {name.lower(): t for name, t in self.adapters[j].items()}
        own |= {"scale": config.scale, "variant": config.variant}
        if config.dropout and config.B == "lora":
            own |= {"dropout_p": config.dropout, "seed": self.seeds[j]}
        return own

    def call(self) -> Tensor:
        rows = self.rows if self.lengths is None else self.lengths
        keywords = [self.keywords(j) for j in range(len(self.adapters))]
        return multi_glora_linear(self.x, self.weight, self.bias, keywords, rows)

    def ours(self) -> dict[str, Tensor]:
        return self.results(self.call)

    def by_rows(self, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        """y of a function of an adapter (-1: none) and its rows."""
        x, rows = self.x.reshape(-1, self.x.shape[-1]), self.rows.reshape(-1)
        y = x.new_zeros(len(x), self.dy.shape[-1])
        for j in range(-1, len(self.adapters)):
            at = (rows == j).nonzero().squeeze(1)
            y = y.index_copy(0, at, function(j, x[at]).to(y.dtype))
        return y.view_as(self.dy)

    def loop(self) -> dict[str, Tensor]:
        def one(j: int, x: Tensor) -> Tensor:
            if j < 0:
                return glora_linear(x, self.weight, self.bias)
            return glora_linear(x, self.weight, self.bias, **self.keywords(j))

        return self.results(lambda: self.by_rows(one))

    def literal(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By the letter, of the same numbers in another dtype."""
        copies = {id(leaf): leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves().values()}

        def own(tensor: Any) -> Any:
            return None if tensor is None else copies.get(id(tensor), tensor.detach().to(dtype))

        weight = own(self.weight)

        def one(j: int, x: Tensor) -> Tensor:
            if j < 0:
                return linear(x, weight, own(self.bias))
            config, keep = self.configs[j], None
            if config.dropout and config.B == "lora":
                keep = reference.keep_mask(self.seeds[j], len(x), x.shape[-1], config.dropout)
            return literal(x, weight, own(self.bias), {n: own(t) for n, t in self.adapters[j].items()}, config, keep)

        copy = Mixed(
            own(self.x), weight, own(self.bias), self.configs,
            [{n: own(t) for n, t in each.items()} for each in self.adapters], self.seeds, self.rows, self.dy.to(dtype),
        )  # fmt: skip
        return copy.results(lambda: copy.by_rows(one))

    def results(self, make: Callable[[], Tensor]) -> dict[str, Tensor]:
        """y and every gradient; zeros where a tensor took no part."""
        leaves = self.leaves()
        y = make()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True)
        found = {"y": y.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
        return found

    def check(self, found: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Against float64, as near as the literal computation in `dtype`."""
        truth, plain = self.literal(torch.float64), self.literal(dtype)
        for name, value in found.items():
            size = float(truth[name].abs().max()) if value.numel() > 1 else self.terms()
            allowed = allowed_error(truth[name], plain[name], dtype, size)
            assert largest_error(value, truth[name]) <= allowed, name

    def terms(self) -> float:
        """The root of the sum of squares of what a single number is summed of, about: its error may be zero by luck."""
        return float(self.dy.double().norm() * (1 + self.x.detach().double().abs().max()))


def mixed(
    configs: Sequence[GLoRAConfig],
    rows: Sequence[int] | Tensor,
    k: int = 20,
    n: int = 11,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    adapters: torch.dtype | None = None,
    lead: tuple[int, ...] | None = None,
    seed: int = 0,
    size: float = 0.3,
) -> Mixed:
    """Random operands for adapters of these configurations, all trained; `rows` as an index."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, own: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(own)

    index = torch.as_tensor(rows, dtype=torch.int64)
    lead = lead or (len(index),)
    made = [
        {
            name: draw(*shape, std=size, own=adapters or dtype).requires_grad_()
            for name, shape in config.parameter_shapes(k, n, bias).items()
        }
        for config in configs
    ]
    return Mixed(
        draw(*lead, k).requires_grad_(), draw(n, k, std=k**-0.5),
        draw(n, std=0.5).requires_grad_() if bias else None, list(configs), made,
        [torch.tensor([0x1234_5678_9ABC_DEF + j]) for j in range(len(configs))], index.view(lead), draw(*lead, n),
    )  # fmt: skip
