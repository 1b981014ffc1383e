"""Groups of LoRA layers to try `ops.grouped_lora_linear` on, and the truth about them in float64.

The truth is written here from the equation, so that it shares no line with the library:

    y_i = x_i·W_iᵀ + s_i·(mask_i∘x_i/(1-p))·down_iᵀ·up_iᵀ + bias_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_kernels import reference
from glora_kernels.ops import glora_linear, grouped_lora_linear
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.routes import backend


@dataclass
class Group:
    """The operands of one call, an entry a member; an entry that is the same object is shared. dys are the dy_i."""

    xs: list[Tensor]
    weights: list[Tensor]
    downs: list[Tensor | None]
    ups: list[Tensor | None]
    biases: list[Tensor | None]
    scales: list[float]
    dropout: float
    seeds: list[Tensor | None]
    dys: list[Tensor]

    @property
    def size(self) -> int:
        return len(self.weights)

    def leaves(self) -> dict[str, Tensor]:
        """The distinct tensors that want a gradient, named by the first member that has them."""
        found: dict[str, Tensor] = {}
        for name in ("xs", "downs", "ups", "biases"):
            for i, tensor in enumerate(getattr(self, name)):
                known = any(tensor is other for other in found.values())
                if tensor is not None and tensor.requires_grad and not known:
                    found[f"{name}[{i}]"] = tensor
        return found

    def freeze(self, trained: Sequence[str]) -> Group:
        """Only the leaves of these names want a gradient."""
        for name, tensor in self.leaves().items():
            tensor.requires_grad_(name in trained)
        return self

    def call(self) -> list[Tensor]:
        return grouped_lora_linear(
            self.xs, self.weights, self.downs, self.ups, self.biases, scales=self.scales, dropout_p=self.dropout,
            seeds=self.seeds,
        )  # fmt: skip

    def loop(self) -> list[Tensor]:
        """The same members one by one, by the operator of a single layer."""
        ys = []
        for i in range(self.size):
            drops = self.dropout if self.downs[i] is not None else 0.0
            ys.append(glora_linear(
                self.xs[i], self.weights[i], self.biases[i], b_up=self.ups[i], b_down=self.downs[i],
                scale=self.scales[i], dropout_p=drops, seed=self.seeds[i] if drops else None,
            ))  # fmt: skip
        return ys

    def literal(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every y and every gradient by the letter, of the same numbers in another dtype."""
        copies = {id(leaf): leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves().values()}

        def own(tensor: Tensor) -> Tensor:
            return copies[id(tensor)] if id(tensor) in copies else tensor.detach().to(dtype)

        ys = []
        for i in range(self.size):
            x, down, up, bias = own(self.xs[i]), self.downs[i], self.ups[i], self.biases[i]
            y = torch.einsum("...k,nk->...n", x, own(self.weights[i]))
            if down is not None and up is not None:
                if self.dropout:
                    rows = x.numel() // x.shape[-1]
                    keep = reference.keep_mask(self.seeds[i], rows, x.shape[-1], self.dropout)
                    x = x * keep.view(x.shape) / (1 - self.dropout)
                y = y + self.scales[i] * torch.einsum("...k,rk,nr->...n", x, own(down), own(up))
            ys.append(y if bias is None else y + own(bias))
        return self.results(ys, dict(zip(self.leaves(), copies.values(), strict=True)))

    def ours(self, route: str = "eager", through: Callable | None = None) -> dict[str, Tensor]:
        with backend(route):
            ys = (self.call if through is None else through(self.call))()
        return self.results(ys, self.leaves())

    def results(self, ys: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every y, and the gradients of the leaves."""
        found = {f"y[{i}]": y.detach() for i, y in enumerate(ys)}
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(ys, self.dys, strict=True) if y.requires_grad]
        if not leaves:
            assert not pairs
            return found
        grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs])
        return found | dict(zip(leaves, grads, strict=True))

    def check(self, got: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Every result within the tolerance of `dtype`; gradients in the shape and dtype of their leaf."""
        truth, plain = self.literal(torch.float64), self.literal(dtype)
        leaves = self.leaves()
        assert got.keys() == truth.keys()
        for name, value in got.items():
            assert value.shape == truth[name].shape, name
            if name in leaves:
                assert value.dtype == leaves[name].dtype, name
            error, allowed = largest_error(value, truth[name]), allowed_error(truth[name], plain[name], dtype)
            assert error <= allowed, f"{name}: error {error:.3e} over {allowed:.3e}"


def build(
    sizes: Sequence[int] = (33, 16, 7),
    *,
    lead: tuple[int, ...] | Sequence[tuple[int, ...]] = (9,),
    k: int | Sequence[int] = 40,
    rank: int | Sequence[int] = 3,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    adapters: torch.dtype | None = None,
    size: float = 0.3,
    seed: int = 0,
) -> Group:
    """Random numbers. One x for all where `lead` and `k` are of one; else each member reads its own."""
    generator = torch.Generator().manual_seed(seed)
    adapters = adapters or dtype

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    members = range(len(sizes))
    one = isinstance(k, int) and all(isinstance(n, int) for n in lead)
    leads = [lead if all(isinstance(n, int) for n in lead) else lead[i] for i in members]
    ks = [k if isinstance(k, int) else k[i] for i in members]
    ranks = [rank if isinstance(rank, int) else rank[i] for i in members]
    xs = [draw(*leads[0], ks[0]).requires_grad_()] * len(sizes)
    if not one:
        xs = [draw(*leads[i], ks[i]).requires_grad_() for i in members]
    return Group(
        xs,
        [draw(sizes[i], ks[i], std=ks[i] ** -0.5) for i in members],
        [draw(ranks[i], ks[i], std=ks[i] ** -0.5, dtype=adapters).requires_grad_() for i in members],
        [draw(sizes[i], ranks[i], std=size, dtype=adapters).requires_grad_() for i in members],
        [draw(n, std=0.5).requires_grad_() for n in sizes],
        [0.5 + 0.25 * i for i in members],
        dropout,
        [torch.tensor([2**62 + 2 * i + 1]) for i in members] if dropout else [None] * len(sizes),
        [draw(*leads[i], sizes[i]) for i in members],
    )


def _tied(group: Group) -> Group:
    """One down, one mask and one scale: one h for all members."""
    group.downs, group.scales = [group.downs[0]] * group.size, [0.5] * group.size
    group.seeds = [group.seeds[0]] * group.size
    return group


def _one_down(group: Group) -> Group:
    """One down, but masks and scales of their own: a path each."""
    group.downs = [group.downs[0]] * group.size
    return group


def _one_mask(group: Group) -> Group:
    group.seeds = [group.seeds[0]] * group.size
    return group


def _partly_tied(group: Group) -> Group:
    """The first two members share a path, the last has its own: one path has more members than another."""
    group.downs[1], group.seeds[1], group.scales[1] = group.downs[0], group.seeds[0], group.scales[0]
    return group


def _shared_rest(group: Group) -> Group:
    """The same W, up and bias for two members of one width."""
    for tensors in (group.weights, group.ups, group.biases):
        tensors[1] = tensors[0]
    return group


def _without(group: Group) -> Group:
    """A member without a pair, one without a bias."""
    group.downs[1] = group.ups[1] = group.biases[2] = None
    return group


def _bases(group: Group) -> Group:
    group.downs, group.ups = [None] * group.size, [None] * group.size
    return group


def _transposed(group: Group) -> Group:
    """As Conv1D keeps W, and as columns of one matrix (GPT-2's c_attn)."""
    k = group.weights[0].shape[1]
    wide = torch.cat([weight.t() for weight in group.weights], 1).contiguous()
    group.weights = [part.t() for part in wide.split([len(weight) for weight in group.weights], 1)]
    assert all(weight.stride(0) == 1 and weight.stride(1) == wide.shape[1] != k for weight in group.weights)
    return group


def _rows_of_one(group: Group) -> Group:
    """The weights are rows, and a half of the columns, of one matrix."""
    k = group.weights[0].shape[1]
    whole = torch.randn(sum(map(len, group.weights)), 2 * k).to(group.weights[0].dtype)
    whole[:, k:] = torch.cat(group.weights)
    group.weights = list(whole[:, k:].split([len(weight) for weight in group.weights]))
    return group


def _strided(group: Group) -> Group:
    """x with a stride of two, dy as the transpose of a matrix, and one dy expanded from a number."""
    x = group.xs[0].detach()
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    group.xs = [wide[..., ::2].requires_grad_()] * group.size
    group.dys = [dy.t().contiguous().t() for dy in group.dys]
    group.dys[0] = torch.ones((), dtype=x.dtype).expand(group.dys[0].shape)
    return group


def _same_numbers(group: Group) -> Group:
    """Equal inputs that are different objects: each has its own gradient."""
    group.xs = [group.xs[0].detach().clone().requires_grad_() for _ in group.xs]
    return group


def _two_inputs(group: Group) -> Group:
    """x, another one, and the first again."""
    group.xs[1] = (group.xs[0].detach() + 1).requires_grad_()
    return group


def _frozen_x(group: Group) -> Group:
    group.xs[0].requires_grad_(False)
    return group


CASES: dict[str, Callable[..., Group]] = {
    "own": build,
    "one member": lambda **more: build((33,), **more),
    "tied": lambda **more: _tied(build(**more)),
    "one down": lambda **more: _one_down(build(**more)),
    "one mask": lambda **more: _one_mask(build(**more)),
    "partly tied": lambda **more: _partly_tied(build(**more)),
    "W, up and bias shared": lambda **more: _shared_rest(build((16, 16, 7), **more)),
    "without": lambda **more: _without(build(**more)),
    "bases alone": lambda **more: _bases(build(**more)),
    "transposed": lambda **more: _transposed(build(**more)),
    "rows of one": lambda **more: _rows_of_one(build(**more)),
    "strided": lambda **more: _strided(build(**more)),
    "same numbers": lambda **more: _same_numbers(build(**more)),
    "two inputs": lambda **more: _two_inputs(build(**more)),
    "frozen x": lambda **more: _frozen_x(build(**more)),
    "ragged": lambda **more: build(
        (40, 7, 1), lead=[(34,), (1,), (5,)], k=[24, 1, 33], rank=[3, 1, 17], **more
    ),
    "three sizes before K": lambda **more: build(lead=(2, 3, 5), **more),
    "one row": lambda **more: build(lead=(), **more),
    "no rows": lambda **more: build(lead=(2, 0), **more),
    "a member without rows": lambda **more: build((16, 7), lead=[(0,), (9,)], **more),
}  # fmt: skip
