"""Register spills: the launches in which a kernel's configuration would spill, and how it is changed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from glora_kernels.runtime.configs import MAX_FACTOR_RANK, OLD


class Beside(NamedTuple):
    """The properties of a launch that cost registers which its configuration does not allow for.

    Attributes:
        arch, dtype: the card's architecture, the dtype of the computation.
        rank: the largest rank in the launch.
        pairs: there are two pairs of low-rank factors. banded: their products come as partial sums, to be added.
        product: one of the pairs is A of the product variant.
        halves: fp32 factors meet 16-bit operands, so each is split into bfloat16 halves.
        drops: dropout masks are drawn.
        aligned: rows are known to begin at multiples of 16 numbers.
        nested: the absmax values of a 4-bit W are themselves quantized, to 8 bits.
        added: terms of GLoRA are added to y. scaled: dy is scaled.
        cast: W is wider than x. decoded: it has 4 bits, and blocks of it are decoded in the product.
        reads_y: y holds more than Z∘(1+a), and the other terms are subtracted.
        inside: h is made in the same kernel as the product.
        pointers: the tile is the one for pointers, because the operands allow no TMA descriptors.
        rows, cols, tma: taken from the configuration, by `fitted`.
    """

    arch: str
    dtype: torch.dtype
    rank: int = 0
    pairs: bool = False
    banded: bool = False
    product: bool = False
    halves: bool = False
    drops: bool = False
    aligned: bool = True
    nested: bool = False
    added: bool = False
    scaled: bool = False
    cast: bool = False
    decoded: bool = False
    reads_y: bool = False
    inside: bool = False
    pointers: bool = False
    rows: int = 0
    cols: int = 0
    tma: bool = False

    @property
    def single(self) -> bool:
        return self.dtype == torch.float32

    @property
    def wide(self) -> bool:
        """Whether factors are multiplied in fp32."""
        return self.single or self.halves

    @property
    def both_halves(self) -> bool:
        """Whether the other operand is split into halves as well: bfloat16 cannot hold the values of fp16."""
        return self.halves and self.dtype == torch.float16

    @property
    def old(self) -> bool:
        return self.arch in OLD

    @property
    def ada(self) -> bool:
        return self.arch in ("sm_86", "sm_89")

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def hopper(self) -> bool:
        return self.arch == "sm_90"

    @property
    def newest(self) -> bool:
        return self.arch == "sm_100"

    @property
    def off(self) -> bool:
        """Large products: whether rows that do not begin at multiples of 16 bytes are read by pointers."""
        return self.arch.startswith("sm_") and not self.tma and not self.aligned

    @property
    def full(self) -> bool:
        """The product of y: whether two pairs take more than a few registers."""
        return self.pairs and (self.banded or self.halves) and not self.pointers

    @property
    def doubled(self) -> bool:
        """The product of dx: whether two pairs are added, or dy is scaled and a mask drawn."""
        return self.pairs or (self.scaled and self.drops)

    @property
    def crowded(self) -> bool:
        """`_grouped_x_kernel`: whether more warps have to share the rows of x."""
        return (self.rank > 16 and self.single) or not self.aligned


class Most(int):
    """In a rule: at most this, where a plain number means exactly this."""


class Half(int):
    """In a rule: half of the configuration's value, but at least this."""


Rule = tuple[Callable[[Beside], bool], dict[str, int]]

_REGISTERS = {"maxnreg": 255}
"""Lets ptxas use all registers, for kernels where it would spill a few bytes so that more programs fit at once."""

_PRODUCT: tuple[Rule, ...] = (
    (lambda b: b.newest and b.halves and not b.pointers, {"part": 32}),
    (lambda b: b.newest and b.halves and b.product and not b.pointers, {"rows": Most(64)}),
    (lambda b: b.off, {"rows": Most(64), "num_warps": 8}),
    (lambda b: b.off and b.arch not in ("sm_80", "sm_90"), {"cols": Most(64)}),
    (lambda b: b.newest, _REGISTERS),  # shared memory lets few programs run at once anyway
)

_DY: tuple[Rule, ...] = (
    (lambda b: b.reads_y and not b.aligned, {"rows": Most(64), "cols": Most(64)}),
    (lambda b: b.reads_y and not b.aligned and b.newest, {"rows": Most(32)}),
    (lambda b: b.reads_y and not b.aligned and b.single, {"cols": Most(32)}),
    (lambda b: not b.reads_y and not b.aligned and b.old, {"num_warps": 8}),
    (lambda b: b.both_halves, {"rows": Half(32), "cols": 32}),
    (lambda b: b.halves and not b.both_halves and (b.pairs or b.newest), {"rows": Most(64)}),
    (lambda b: b.pairs if b.both_halves else b.wide, _REGISTERS),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "fwd": (
        (lambda b: b.hopper and b.added and not b.pointers, {"part": 32}),
        *_PRODUCT,
        (lambda b: b.full and not b.hopper and b.cols > 128, {"cols": Most(128), "parts": 2}),
        (lambda b: b.full and b.hopper, {"rows": Most(64), "cols": Most(128), "part": 32, "num_warps": 8}),
    ),
    "dx": (
        *_PRODUCT,
        (lambda b: b.doubled and b.cols > 128 and not b.pointers, {"cols": Most(128), "parts": 2}),
        (lambda b: (b.old and b.cast) or (b.arch == "sm_89" and b.drops and b.halves), {"cols": Most(64)}),
        (lambda b: b.newest and b.scaled, {"num_warps": 8}),
        (lambda b: b.ada, _REGISTERS),
    ),
    "prepare": (
        (lambda b: b.drops and b.rank > 32 and not b.single, {"num_warps": 8}),
        (lambda b: b.halves and b.newest, _REGISTERS),
    ),
    "added_terms": (
        (lambda b: b.halves and b.newest, _REGISTERS),
        (lambda b: b.halves and b.amd, {"cols": Most(32)}),
    ),
    "dy": _DY,
    "x": (
        (lambda b: b.halves and b.rank > MAX_FACTOR_RANK, {"rows": Most(32)}),
        (lambda b: b.halves and b.rank > MAX_FACTOR_RANK and b.amd, {"cols": Most(32)}),
        (lambda b: b.both_halves, {"cols": Most(64), "num_stages": 2}),
        (lambda b: b.pairs or (b.wide and not b.both_halves), _REGISTERS),
        (lambda b: not b.aligned, {"cols": Most(64), "num_warps": 8}),
    ),
    "finish": (
        (lambda b: not b.aligned, {"tokens": Most(64), "num_warps": 8}),
        (lambda b: b.cast and b.newest, {"num_warps": 8}),
        (lambda b: b.aligned and b.ada, _REGISTERS),
    ),
    "hadamard_grad": (  # with halves, wider blocks would also exceed the shared memory of sm_89
        (lambda b: (b.halves and (b.old or b.newest)) or not b.aligned, {"cols": Most(64)}),
        (lambda b: b.single and not b.aligned, {"cols": Most(32)}),
    ),
    "grouped_fwd": (  # with h made inside and several parts, ptxas would serialize wgmma
        (lambda b: b.inside, {"parts": 1}),
        (lambda b: b.inside and b.tma and b.cols == 256, {"num_stages": Most(3)}),  # a whole store takes one of them
        (lambda b: b.newest, _REGISTERS),
    ),
    "grouped_dx": (
        *_PRODUCT,
        (lambda b: b.old and not b.single, _REGISTERS),
        (lambda b: b.amd and not b.halves, {"part": 32}),
        (lambda b: b.newest and b.drops and b.halves and not b.pointers, {"cols": Most(64)}),
    ),
    "grouped_down": (
        (lambda b: b.rank > 16, {"num_warps": 8}),
        (lambda b: b.rank > 16 and b.single, {"rows": 16}),
        (lambda b: b.rank > 16 and b.single and not b.amd, {"depth": 64}),
        (lambda b: b.rank <= 16 and b.halves, {"num_stages": Most(2)}),
        (lambda b: b.rank <= 16 and b.halves and b.newest, _REGISTERS),
    ),
    "grouped_dy": (*_DY, (lambda b: b.single, {"rows": Most(32)})),
    "grouped_x": (
        (lambda b: b.crowded, {"num_warps": 8}),
        (lambda b: not b.crowded and (b.drops or b.rank > (32 if b.newest else 64)), _REGISTERS),
    ),
    "dequantize_adapted": ((lambda b: b.newest, {"num_warps": 8}),),
    "small_m": (
        (lambda b: (b.halves and b.rows == 64) or (b.rank > 32 and b.rows == 32), {"depth": Most(64)}),
        (lambda b: b.nested and b.newest, _REGISTERS),
    ),
    "shared_grad": (
        (lambda b: b.drops or not b.aligned, _REGISTERS),
        (lambda b: (b.drops or b.halves or not b.aligned) and b.old and b.rows > 16, {"cols": 32}),
    ),
    "multi_shrink": (
        (lambda b: b.halves, {"cols": Most(64)}),
        (lambda b: b.drops or b.rank > 16, _REGISTERS),
        (lambda b: not b.aligned, {"num_warps": 8}),
    ),
    "multi_expand": (
        (lambda b: b.old or b.newest, _REGISTERS),
        (lambda b: not b.aligned, {"num_warps": 8}),
    ),
    "multi_outer": ((lambda b: b.halves or b.drops, _REGISTERS),),
    "expert_product": (
        (lambda b: b.decoded or b.single, _REGISTERS),
        (lambda b: b.single, {"num_warps": 8}),
        (lambda b: b.newest, {"rows": Most(64)}),
        (lambda b: not b.aligned, {"rows": Most(64), "cols": Most(64), "num_warps": 8}),
        (lambda b: not b.aligned and b.single, {"cols": Most(32)}),
    ),
}
"""For each kernel, rules (condition, changes): those whose condition holds change the configuration, in this order.
`part`: the columns that one part of a tile has. Every change was found by compiling (`tools.aot`)."""


def fitted(kernel: str, config: dict[str, int], beside: Beside) -> dict[str, int]:
    """The configuration, changed by the rules of the kernel that hold for this launch, so that it does not spill."""
    beside = beside._replace(
        rows=config.get("rows", beside.rows), cols=config["cols"], tma=bool(config.get("tma", False))
    )  # fmt: skip
    for holds, change in RULES[kernel]:
        if holds(beside):
            for name, value in change.items():
                if name == "part":
                    config = config | {"parts": max(1, config["cols"] // value)}
                elif name != "maxnreg" or beside.arch.startswith("sm_"):
                    config = config | {name: _changed(config.get(name, value), value)}
    return config


def _changed(old: int, value: int) -> int:
    if isinstance(value, Half):
        return max(int(value), old // 2)
    return min(int(value), old) if isinstance(value, Most) else value
