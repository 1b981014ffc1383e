"""The launchers of the large products: each turns tensors into one `Launch` of its kernel. They allocate nothing.

`arch` is chosen by the caller (`plan.arch_of`), so that a launch can be planned for a card that is not here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.glora import _glora_dx_kernel, _glora_fwd_kernel
from glora_kernels.kernels.operands import Numerics, Terms
from glora_kernels.launch import configs, plan, tables
from glora_kernels.launch.plan import NO_DROPOUT, Dropout, Launch, descriptor, halves, matrix, numerics, options
from glora_kernels.launch.sizes import lesser, rows

GROUP = 8
"""Row tiles that share their columns in the L2 (`kernels.common._tile_of`)."""

RANK_BLOCK = 16
"""Columns of the low-rank term at a time, at any rank: more of them spill beside the product's accumulator."""


def glora_fwd_launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    terms: Terms,
    *,
    low_sum: Tensor | None = None,
    sigma_sum: Tensor | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """y (M,N) = (x·Wᵀ)∘(1+a) + P·Uᵀ + h·upᵀ + σ·bᵀ + β, with `low` = [P | h] (bands,M,P+R) and σ (bands,M).

    u and up are contiguous. `low_sum` (M,P+R) and `sigma_sum` (M,) receive the sums over more than one band.
    """
    m, (n, k) = rows(x), weight.shape
    p, r = (0 if t is None else t.shape[1] for t in (terms.u, terms.up))
    bands = next((t.shape[0] for t in (terms.low, terms.sigma) if t is not None), 1)
    shape = configs.Shape(configs.m_class(m), n, k, max(p, r))
    config = config or tables.choose("fwd", arch, x.dtype, shape, weight.dtype)
    numbers = numerics(x.dtype, terms.u, terms.up)
    shift = terms.shift
    added = any(t is not None for t in (terms.a, terms.u, terms.up, terms.b, shift.wc, shift.d, shift.e))
    config = in_parts(config, arch, numbers, added)
    if arch == "sm_100" and p and halves(numbers):
        config = config | {"rows": min(64, config["rows"])}  # of two pairs of factors: what does not spill
    if p and r and (bands > 1 or halves(numbers)):
        config = configs.beside_pairs(config, arch)
    operands, config = _operands(x, weight, y, config, arch)
    args = {
        **dict(zip(("x", "w", "y"), operands, strict=True)), "terms": plan.terms(terms),
        "low_sum_ptr": low_sum, "sigma_sum_ptr": sigma_sum,
        "M": m, "N": n, "K": k, "P": p, "R": r,
        "RANK_STEP": plan.rank_step(p, r), "BANDS": bands,
        **_tile(config, weight, numbers, "BLOCK_N", "BLOCK_K"),
    }  # fmt: skip
    return product_launch(_glora_fwd_kernel, _tiles(m, n, config), args, y, config, arch)


def glora_dx_launch(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    *,
    s: Tensor | None = None,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    a: Tensor | None = None,
    tau: Tensor | None = None,
    totals: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout = NO_DROPOUT,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """dx (M,K) = (dy∘(1+a))·W + S[:, :P]·a_down + mask∘(S[:, P:]·b_down)/(1-p) + τ·1ᵀ, S (bands,M,P+R), τ (bands,M).

    `totals`: vectors (I,N), which the launch before must have left, and (I,) to receive their sums over N.
    """
    m, (n, k) = rows(dy), weight.shape
    p, r = (0 if t is None else t.shape[0] for t in (a_down, b_down))
    bands = next((t.shape[0] for t in (s, tau) if t is not None), 1)
    shape = configs.Shape(configs.m_class(m), n, k, max(p, r))
    config = config or tables.choose("dx", arch, dy.dtype, shape, weight.dtype)
    numbers = numerics(dy.dtype, a_down, b_down)
    config = in_parts(config, arch, numbers)
    if arch == "sm_100" and p and halves(numbers):
        config = config | {"rows": min(64, config["rows"])}  # of two pairs of factors: what does not spill
    if (p and r) or (a is not None and dropout.p > 0.0):
        config = configs.narrow(config)
    operands, config = _operands(dy, weight.t(), dx, config, arch)
    cast = weight.dtype != dy.dtype and b_down is not None  # of a wider W, on its way
    if (arch in configs.OLD and cast) or (arch == "sm_89" and dropout.p > 0.0 and halves(numbers)):
        config = config | {"cols": min(64, config["cols"])}  # what does not spill
    elif arch == "sm_100" and a is not None:
        config = config | {"num_warps": 8}
    if arch in ("sm_86", "sm_89"):
        config = configs.all_registers(config, arch)
    vectors, sums = totals or (None, None)
    args = {
        **dict(zip(("dy", "w", "dx"), operands, strict=True)),
        "s": matrix(s), "a_down": matrix(a_down), "b_down": matrix(b_down), "a": plan.vector(a), "tau": plan.sums(tau),
        "vectors_ptr": vectors, "totals_ptr": sums,
        "M": m, "N": n, "K": k, "P": p, "R": r,
        **dropout.arguments(b_down),
        "RANK_STEP": plan.rank_step(p, r) if p else 1,  # alone, S has rows to read in whole
        "TOTALS": 0 if vectors is None else vectors.shape[0], "BANDS": bands,
        **_tile(config, weight.t(), numbers, "BLOCK_K", "BLOCK_N"),
    }  # fmt: skip
    return product_launch(_glora_dx_kernel, _tiles(m, k, config), args, dx, config, arch)


def in_parts(config: dict[str, int], arch: str, numbers: Numerics, added: bool = False) -> dict[str, int]:
    """A product's configuration beside what spills in fewer parts.

    On sm_100 that are halves of fp32 factors; on sm_90 all that may be `added` to y but a bias.
    """
    small = (arch == "sm_100" and halves(numbers)) or (arch == "sm_90" and added)
    return config | {"parts": max(1, config["cols"] // 32)} if small else config


def _operands(
    left: Tensor, right: Tensor, out: Tensor, config: dict[str, int], arch: str
) -> tuple[tuple[Any, Any, Any], dict[str, int]]:
    """left, right (cols, depth) in any order and out of a product left·rightᵀ, and the configuration that suits them.

    As descriptors, all of them, where the configuration wants TMA and it can read them; else as matrices, with the
    tile for those.
    """
    mixed = right.dtype != left.dtype
    base = right if right.stride(1) == 1 else right.t()
    if config["tma"] and not mixed:
        tall, cols, depth = config["rows"], config["cols"], config["depth"]
        found = (
            descriptor(left, tall, depth),
            descriptor(base, cols, depth) if base is right else descriptor(base, depth, cols),
            descriptor(out, tall, cols // config["parts"]),
        )
        if None not in found:
            return found, config
    if config["tma"]:
        shape = configs.m_class(rows(out)), out.shape[1]
        config = configs.large_product(arch, left.dtype, *shape, mixed=mixed, tma=False)
    if arch.startswith("sm_") and left.stride(0) % 16:  # read by pointers, off 16 bytes: what does not spill
        cols = config["cols"] if arch in ("sm_80", "sm_90") else min(64, config["cols"])
        config = config | {"rows": min(64, config["rows"]), "cols": cols, "num_warps": 8}
    return (matrix(left), matrix(right), matrix(out)), config


def _tile(config: dict[str, int], right: Tensor, numbers: Numerics, cols: str, depth: str) -> dict[str, Any]:
    """What a large product's kernel is compiled for: its tile, whose columns and depth have these names."""
    return {
        "TMA": bool(config["tma"]), "COLS_FIRST": right.stride(1) == 1, "PARTS": config["parts"], "NUMERICS": numbers,
        "BLOCK_M": config["rows"], cols: config["cols"], depth: config["depth"], "BLOCK_R": RANK_BLOCK, "GROUP": GROUP,
    }  # fmt: skip


def product_launch(
    kernel: Any, tiles: int, args: dict[str, Any], out: Tensor, config: dict[str, int], arch: str
) -> Launch:
    """One program a tile, or where persistent one a multiprocessor of the card the tensor is on."""
    if config["persistent"]:
        tiles = lesser(tiles, plan.programs_of(out, arch))
    if arch == "sm_100":  # shared memory leaves few programs at once as it is
        config = configs.all_registers(config, arch)
    return Launch(kernel, (tiles,), args, options(config, args))


def _tiles(m: int, cols: int, config: dict[str, int]) -> int:
    return cdiv(m, config["rows"]) * cdiv(cols, config["cols"])
