"""What is run on every instrument: calls of the operators by form, as the rows of the table name it.

A form stands for several calls; sizes are such that a product has several tiles in each direction, and none of them
divides by a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from adapters import mixed
from depth import test_over_depth as over_depth
from groups import CASES as GROUPS
from groups import build
from helpers import config, problem, train_only
from routed import RAGGED, routed

from evidence.problems import Group, Layer, Model, Rows, Shared
from glora_kernels.four_bit import small_m
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.reference.cases import AWKWARD
from glora_kernels.runtime import tables
from glora_kernels.runtime.routes import batch_invariant
from glora_kernels.spec import CHOICES, GLoRAConfig

Problem = Group | Layer | Model | Rows | Shared
Form = Callable[[torch.dtype], Iterator[Problem]]
"""The problems of a form in a dtype, on the CPU."""

M, N, K = 70, 264, 136
ROUTES = [f"route {which}{scaled}" for which in ("fwd", "dx") for scaled in ("", " scaled")]
SMALL = 0.05
"""The size of adapters, as in the tests that run on a card: y stays of the size of x·Wᵀ."""


def pairs(a: str) -> Form:
    """A in one form: beside every B, with C, D and E in some; with dropout; of small and large ranks and odd sizes."""

    def made(dtype: torch.dtype) -> Iterator[Problem]:
        supports = itertools.cycle([("lora", "constant", "vector"), ("vector", "vector", "constant"), ("none",) * 3])
        for b, (c, d, e) in zip(CHOICES["B"], supports, strict=False):
            if (a, b) != ("none", "none"):
                yield Layer(problem(GLoRAConfig(a, b, c, d, e, 8), (M,), K, N, True, dtype, size=SMALL))
        yield Layer(problem(config(a, "lora", rank=72, dropout=0.2), (M,), K, N, True, dtype, size=SMALL))
        for lead, k, n, rank in AWKWARD:  # of ranks 1, 3, 4, 16 and 65
            yield Layer(problem(config(a, "lora", rank=rank, dropout=0.2), lead, k, n, True, dtype, size=SMALL))
        yield Layer(problem(config(a, "lora"), (37,), 72, 80, True, dtype, size=SMALL, layout="strided"))

    return made


def layers(*configs: GLoRAConfig, inside: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Form:
    def made(dtype: torch.dtype) -> Iterator[Problem]:
        for one in configs:
            yield Layer(problem(one, (M,), K, N, True, dtype, size=SMALL), inside=inside)

    return made


def wide_factors(dtype: torch.dtype) -> Iterator[Problem]:
    """Factors in fp32 over 16 bits; the same as others where all is fp32."""
    if dtype != torch.float32:
        for a in ("none", "vector", "lora"):
            p = problem(config(a, "lora", rank=16), (M,), K, N, True, dtype, torch.float32, size=SMALL)
            yield Layer(p)


def four_bits(dtype: torch.dtype, rows: int, k: int, trains: bool, *forms: str) -> Iterator[Layer]:
    for a, nested in itertools.product(forms, (False, True)):
        p = problem(config(a, "lora", rank=16), (rows,), k, N, True, dtype, size=SMALL)
        codes = quantize_weight(p.weight, "nf4", 64, nested)
        p = replace(p, weight=dequantize(codes, dtype))
        yield Layer(p if trains else train_only(p, ()), codes)


def nf4_training(dtype: torch.dtype) -> Iterator[Problem]:
    yield from four_bits(dtype, M, K, True, "none", "vector", "lora")


def nf4_decode(dtype: torch.dtype) -> Iterator[Problem]:
    """Of whole blocks a row, which a kernel of its own takes, with h in it and before it, and of others."""
    # PyTorch on a CPU sums 3 rows in an order of its own, several times nearer to the truth than fp32 in sequence, as
    # a card adds them: over 64 columns both are as near.
    for rows, k in ((1, 192), (3, 64), (16, 192), (33, 192)):
        yield from four_bits(dtype, rows, k, False, "none", "vector")
    for layer in four_bits(dtype, 16, 192, False, "none"):
        yield replace(layer, inside=partial(mock.patch.object, small_m, "h_before", return_value=True))
    yield from four_bits(dtype, 16, K, False, "none", "vector")


def siblings(dtype: torch.dtype) -> Iterator[Problem]:
    """q, k and v: each with a path of its own, dropped or not; of a rank above a block; one without a pair."""
    for name, dropout, rank in (("own", 0.0, 8), ("own", 0.2, 8), ("own", 0.0, 72), ("without", 0.0, 8)):
        group = GROUPS[name](sizes=(N, 72, 40), lead=(M,), k=K, rank=rank, dropout=dropout, dtype=dtype, size=SMALL)
        yield Group(group)
    group = build((N, 72, 40), lead=(M,), k=K, rank=8, dtype=dtype, size=SMALL)
    yield Group(group.freeze(["xs[0]"]))  # whose S nothing else sums


def tied(dtype: torch.dtype) -> Iterator[Problem]:
    for name, dropout in (("tied", 0.0), ("tied", 0.2), ("partly tied", 0.0), ("one down", 0.2)):
        yield Group(GROUPS[name](sizes=(N, 72, 40), lead=(M,), k=K, rank=8, dropout=dropout, dtype=dtype, size=SMALL))


LORA = [GLoRAConfig.lora(3, 6.0), GLoRAConfig.lora(16, 8.0, dropout=0.3), GLoRAConfig.lora(72, 8.0)]
MIXED = [
    GLoRAConfig("vector", "lora", "vector", "vector", "vector", 3, 2.0),
    GLoRAConfig("constant", "vector", "lora", "none", "constant", 1),
    GLoRAConfig("none", "none", "none", "none", "vector"),
    GLoRAConfig.lora(16, 16.0),
]


def _rows(count: int, rows: int = 37) -> torch.Tensor:
    """An adapter for each row, none for some."""
    return torch.randint(-1, count, (rows,), generator=torch.Generator().manual_seed(0))


def many(dtype: torch.dtype) -> Iterator[Problem]:
    for configs, rows in ((LORA, 37), (MIXED, 37), (MIXED, 1)):
        yield Rows(mixed(configs, _rows(len(configs), rows), K, N, dtype=dtype, size=SMALL))


def many_nf4(dtype: torch.dtype) -> Iterator[Problem]:
    p = mixed(MIXED, _rows(len(MIXED)), K, N, dtype=dtype, size=SMALL)
    codes = quantize_weight(p.weight, "nf4")
    yield Rows(replace(p, weight=codes), replace(p, weight=dequantize(codes, dtype)))


EXPERTS = [
    GLoRAConfig.lora(3, 6.0), GLoRAConfig.lora(72, 8.0, dropout=0.4),
    GLoRAConfig("vector", "lora", "vector", "vector", "vector", 3, 2.0),
    GLoRAConfig("vector", "vector", "none", "none", "none"),
    GLoRAConfig("constant", "constant", "lora", "none", "constant", 1),
    GLoRAConfig("lora", "lora", "none", "none", "vector", 2, variant="matmul"),
]  # fmt: skip
SORTED = RAGGED.flatten().clamp(min=0, max=4).sort().values


def experts(dtype: torch.dtype) -> Iterator[Problem]:
    for one in EXPERTS:
        yield Rows(routed(one, RAGGED, k=72, n=80, bias=one.D != "none", dtype=dtype, size=SMALL))
    yield Rows(routed(EXPERTS[0], SORTED, k=72, n=80, dtype=dtype, is_sorted=True, size=SMALL))


def experts_nf4(dtype: torch.dtype) -> Iterator[Problem]:
    p = routed(EXPERTS[2], RAGGED, k=72, n=80, bias=True, dtype=dtype, size=SMALL)
    p.weight = quantize_weight(p.weight.view(-1, 72), "nf4", double_quant=True)
    yield Rows(p)


MODEL = [
    (GLoRAConfig("lora", "lora", "lora", "vector", "vector", 3, 6.0), N, K),
    (GLoRAConfig("vector", "vector", "vector", "constant", "constant"), 45, 33),
    (GLoRAConfig("none", "lora", "none", "none", "constant", 72), 72, 129),
    (GLoRAConfig("lora", "constant", "vector", "none", "vector", 3, variant="matmul"), 40, 70),
]


def models(dtype: torch.dtype) -> Iterator[Problem]:
    made = (problem(one, (37,), k, n, True, dtype, size=SMALL) for one, n, k in MODEL)
    yield Model([train_only(p, ["x", *p.params]) for p in made])


def shared(dtype: torch.dtype) -> Iterator[Problem]:
    """Factors of a model in one launch: down and up, with a mask and without, of strided rows and of none."""
    yield Shared([
        (name == "b_up", over_depth.make_products(dtype, "cpu", rank, cols, rows, p, i, layout))
        for i, (name, rank, cols, rows, p, layout) in enumerate(over_depth.FACTORS)
    ])  # fmt: skip


FORMS: dict[str, Form] = {
    **{f"A={a}": pairs(a) for a in CHOICES["A"]},
    "product variant": layers(*(config("lora", b, "matmul", rank=8) for b in CHOICES["B"])),
    "fp32 factors": wide_factors,
    "batch_invariant": layers(*(config(a, "lora", rank=8) for a in ("none", "vector", "lora")), inside=batch_invariant),
    "library route": layers(
        *(config(a, "lora", rank=8, dropout=0.2) for a in ("none", "vector", "lora")),
        inside=partial(tables.using, None, dict.fromkeys(ROUTES, "library")),
    ),
    "NF4 training": nf4_training,
    "NF4 decode": nf4_decode,
    "q/k/v": siblings,
    "q/k/v, tied": tied,
    "many adapters": many,
    "many adapters, NF4": many_nf4,
    "experts": experts,
    "experts, NF4": experts_nf4,
    "all layers at once": models,
    "shared factors": shared,
}
