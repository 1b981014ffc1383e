"""Default launch configurations: pure functions of kernel, architecture, dtype and shape. No call ever tunes.

`arch` is "sm_80", "sm_89", "sm_90", "sm_100", "gfx942" …, or "cpu" in the interpreter. Shared memory per block,
which bounds BLOCK_* × stages: 163 KiB on sm_80, 99 KiB on sm_86/sm_89, 227 KiB on sm_90 and sm_100, 64 KiB on gfx942.
A configuration is a dictionary: blocks (`rows`, `cols`, `depth` of a product's tile), num_warps, num_stages and, for
the two large products, tma, persistent and parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

OLD = ("sm_80", "sm_86", "sm_89")
"""Cards without wgmma, whose matrix instructions read their operands from registers."""

TOTALS_BESIDE_DX = ("sm_90", "sm_100", "cpu")
"""Where `_glora_dx_kernel` also sums the gradients of constants; its pointers leave no registers for that elsewhere."""

MAX_RANK = 256
"""Up to this rank the kernels hold a low-rank factor's columns in registers."""

MAX_FACTOR_RANK = 32
"""Up to this rank `_dy_kernel` takes dyᵀh as well; above, its partial sums would move more than reading dy again."""

RANK_BLOCK = 64
"""The most columns of S that one program computes, or multiplies x by; larger ranks are split over programs."""

MAX_BANDS = 8
"""The most bands that the reduction of h, S, σ or τ is split into; the next kernel adds the partial sums."""

PROGRAMS = {"cpu": 4, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of the largest card of an architecture."""

TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (64, 32))
"""Rows and columns of a large product's tile in 16 bits, from the one that reads least to the smallest."""

READING = {"sm_90": 60, "sm_100": 80}
"""16-bit multiply-adds that a multiprocessor does while it reads one number from the L2 (datasheets); 25 elsewhere."""

READERS = 0.6
"""The share of the multiprocessors that is enough to saturate the L2 (an estimate)."""

DECODED = 8192
"""Numbers of a 4-bit W that a program of 128 threads decodes per step; more would leave no registers for the sums."""

GEMV_TOKENS = 4
"""Up to this M, csrc multiplies decoded W and x in fp32; above, tensor cores take eight tokens at a time."""

SCRATCH_FLOATS = 1 << 15
"""The most floats of partial sums that one launch of csrc writes."""

M_CLASSES = (64, 512, 2048, 4096)
"""The classes of M, by their largest member, which stands for the class; the last also stands for every larger M."""

INVARIANT_M = M_CLASSES[1]
"""The M that every configuration is chosen by inside `batch_invariant`: between those of sampling and of training."""

SHARED_LIMIT = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_87": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448,
    "sm_103": 232_448, "gfx942": 65_536,
}  # fmt: skip
"""Shared memory that a block may use, in bytes; 99 KiB on other cards."""


class Shape(NamedTuple):
    """One call: x (M,K), W (N,K), rank R (of the larger low-rank pair, 0 without one)."""

    m: int
    n: int
    k: int
    r: int


def m_class(m: int) -> int:
    """The number of rows that stands for M wherever a configuration is chosen by it: one of `M_CLASSES`.

    This bounds the number of configurations and compilations; only sizes and grids are computed from M itself.
    """
    return next((most for most in M_CLASSES if m <= most), M_CLASSES[-1])


def tokens(m: int) -> int:
    """A finer class of M up to `M_CLASSES[0]`, for the product of a few tokens with a 4-bit weight.

    1 for one token, else M padded to a power of two of at least 16, the smallest that a matrix instruction takes.
    """
    return 1 if m == 1 else block_r(m)


def representative(m: int) -> int:
    """The M that a program of launches is planned for (`runtime.program`): no choice depends on more of M than this."""
    return tokens(m) if m <= M_CLASSES[0] else m_class(m)


def classes(most: int) -> list[int]:
    """An M of each class of `representative` that begins at or below `most`: its representative, or `most` if less."""
    found: list[int] = []
    m = 1
    while m <= most and (top := representative(m)) >= m:
        found.append(min(top, most))
        m = top + 1
    return found


def block_r(rank: int, limit: int = 256) -> int:
    """The padded rank of one step: a power of two, at least 16: the least that a matrix instruction takes."""
    return max(16, min(limit, 1 << (rank - 1).bit_length()))


def programs(arch: str) -> int:
    """How many programs keep the card busy at one a multiprocessor."""
    return PROGRAMS.get(arch, 108)


def default(
    kernel: str, arch: str, dtype: torch.dtype, shape: Shape, weight_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """The default configuration of a kernel of `KERNELS` or `CSRC`.

    Under autocast the weight may be wider than x (`weight_dtype`) and takes more of the pipeline's shared memory.
    """
    if kernel in ("fwd", "dx"):
        mixed = weight_dtype is not None and weight_dtype.itemsize > dtype.itemsize
        return large_product(arch, dtype, shape.m, shape.n if kernel == "fwd" else shape.k, mixed)
    if kernel in CSRC:
        return CSRC[kernel](arch, dtype, shape)
    return _interpreted(kernel) if arch == "cpu" else KERNELS[kernel].default(arch, dtype, shape)


def large_product(
    arch: str, dtype: torch.dtype, rows: int, cols: int, mixed: bool = False, tma: bool = True
) -> dict[str, int]:
    """Tile of `_glora_fwd_kernel` and `_glora_dx_kernel` for a (rows, cols) output: the one of least `product_cost`.

    `parts`: the columns of a tile are finished and stored in this many parts. Without `tma`, or where the operands rule
    it out (`mixed`: a weight wider than x; strides off 16 bytes), the operands are read by pointers.
    """
    if arch == "cpu":
        return _interpreted("fwd") | {"tma": tma and not mixed}
    through_tma = tma and not mixed and arch in ("sm_90", "sm_100") and dtype != torch.float32
    # cp.async keeps the pipeline fullest with two programs per multiprocessor; a persistent grid has only one.
    way = {"tma": through_tma, "persistent": through_tma}
    if dtype == torch.float32:
        warps = 8 if arch == "sm_90" else 4  # so that it does not spill
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": warps, "num_stages": 2, "parts": 1, **way}
    # On sm_100 the full epilogue of a 128x256 tile spills.
    widest = 256 if through_tma and arch == "sm_90" else 128
    sizes = [size for size in TILES if size[1] <= widest and size[0] <= max(64, rows)]
    tall, wide = min(sizes, key=lambda size: product_cost(arch, rows, cols, *size))
    tile = {"rows": tall, "cols": wide, "depth": 64, "num_stages": 4, **way}
    if arch.startswith("gfx"):
        return tile | {"num_warps": 4, "num_stages": 2, "parts": 1}
    if mixed:
        tile["num_stages"] = 2
    elif arch not in ("sm_80", "sm_90", "sm_100"):
        tile["num_stages"] = 3
    warps = 8 if tall == 128 or (arch in OLD and wide == 128) else 4
    parts = 2 if arch == "sm_100" and wide == 64 else max(1, wide // 64)
    return tile | {"num_warps": warps, "parts": parts}


def product_cost(arch: str, rows: int, cols: int, tall: int, wide: int) -> int:
    """Estimated time of a (rows, cols) product in (tall, wide) tiles, in multiply-adds of a multiprocessor per depth.

    The number of waves of tiles, times the larger of computing a tile and reading its operands; reading slows down once
    more than `READERS` of the card reads.
    """
    tiles, here = _ceil(rows, tall) * _ceil(cols, wide), programs(arch)
    crowd = max(1.0, min(tiles, here) / (READERS * here))
    return _ceil(tiles, here) * max(tall * wide, int((tall + wide) * READING.get(arch, 25) * crowd))


def into_rank(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_prepare_kernel`: rows of x, depth of the reduction.

    Few rows keep Triton on mma.sync: wgmma would be serialized, because the dropped x is made in registers, and a
    memory-bound kernel gains nothing from it. Fewer rows let more programs read x, each several steps ahead; but every
    program also reads a whole factor, which at a large rank is as many bytes as its rows of x.
    """
    config = added_terms(arch, dtype, shape)
    if dtype == torch.float32 or arch.startswith("gfx") or shape.r > 16:
        return config
    return config | {"rows": 16, "num_stages": 6}


def added_terms(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_added_terms_kernel`: rows of x and y, columns of y, depth of the reduction. See `into_rank`."""
    depth = 64 if arch == "sm_100" or shape.r > 16 else 128
    if shape.r > 64:
        depth = 32
    if dtype == torch.float32:
        cols = 32 if arch.startswith("gfx") else 64
        return {"rows": 32, "cols": cols, "depth": 32, "num_warps": 8, "num_stages": 2}
    warps = 8 if (shape.r > 16 and arch == "sm_89") or (shape.r > 64 and arch == "sm_100") else 4
    return {"rows": 32, "cols": 128, "depth": depth, "num_warps": warps, "num_stages": 2}


def dy_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_dy_kernel`: rows and columns of dy per step.

    Each block of rows leaves a partial sum (R, N) behind, written and read in fp32: with 128 rows that is R/32 of the
    bytes of a 16-bit dy. So above `MAX_FACTOR_RANK` `_x_kernel` computes dyᵀh, from a second read of dy.
    """
    if dtype == torch.float32:
        cols = 32 if shape.r > MAX_FACTOR_RANK else 64
        return {"rows": 32, "cols": cols, "num_warps": 8, "num_stages": 1 if arch.startswith("gfx") else 2}
    amd = arch.startswith("gfx")
    stages = 2 if amd else 4  # with so few programs only loads issued ahead hide the latency of memory
    if shape.r > MAX_FACTOR_RANK:  # in one band of N
        rows = 32 if shape.m <= 512 else 64
        return {"rows": rows, "cols": 64, "num_warps": 4, "num_stages": 1 if amd else stages}
    rows = 64 if amd or shape.m < 2048 else 128
    return {"rows": rows, "cols": 64, "num_warps": 8 if shape.r > 16 else 4, "num_stages": stages}


def dy_mixed_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_dy_kernel` where it subtracts the other terms from y to get Z: their tiles take registers as well."""
    config = dy_pass(arch, dtype, shape)
    if arch.startswith("gfx"):
        config = config | {"cols": 32}  # so that it does not spill
    if dtype == torch.float32:
        return config | {"rows": 32, "num_warps": 8}
    return config | {"rows": min(config["rows"], 64 if arch == "sm_100" else 128), "num_warps": 8}


def x_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_x_kernel`: rows and columns of x per step. Columns are many, as each block of them reads all of S."""
    if dtype == torch.float32:
        return {"rows": 32, "cols": 64 if shape.r <= 16 else 32, "num_warps": 8, "num_stages": 2}
    warps = 8 if shape.r > 16 or arch == "sm_89" else 4
    if arch.startswith("gfx"):
        return {"rows": 64, "cols": 128 if shape.r <= 16 else 64, "num_warps": warps, "num_stages": 2}
    rows = 64 if shape.r > MAX_FACTOR_RANK else 32
    return {"rows": rows, "cols": 128, "num_warps": warps, "num_stages": 3}


def hadamard_grad(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_hadamard_grad_kernel`: weight rows and columns, depth of the reduction over the tokens."""
    if dtype == torch.float32:
        warps = 8 if arch in ("sm_90", "sm_100") else 4  # so that it does not spill
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": warps, "num_stages": 2}
    stages = 3 if arch in ("sm_80", "sm_90", "sm_100") else 2
    return {"rows": 128, "cols": 128, "depth": 64, "num_warps": 8, "num_stages": stages}


def finish(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_finish_kernel`: rows, columns of gradients; tokens, depth of x·Wᵀ where it is computed again."""
    if dtype == torch.float32:  # the blocks of 16-bit dtypes spill here
        return {"rows": 32, "cols": 32, "tokens": 32, "depth": 32, "num_warps": 8, "num_stages": 2}
    warps = 8 if arch == "sm_80" else 4
    return {"rows": 32, "cols": 32, "tokens": 128, "depth": 64, "num_warps": warps, "num_stages": 2}


def weight_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of W in kernels that read it once: for W_eff, U, W·c and Wᵀg."""
    cols = 32 if dtype == torch.float32 else (64 if arch == "sm_100" else 128)
    return {"rows": 16 if dtype == torch.float32 else 32, "cols": cols, "num_warps": 4, "num_stages": 2}


def dequantize(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks in which a 4-bit W is dequantized: rows × columns where A or B is added, else rows·cols numbers.

    `depth` is a step of the rank.
    """
    if dtype == torch.float32:
        return {"rows": 32, "cols": 64, "depth": 16, "num_warps": 4, "num_stages": 2}
    return {"rows": 32, "cols": 128, "depth": 32, "num_warps": 4, "num_stages": 2}


def small_m(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_small_m_kernel`: rows of W (`cols`) and depth of the reduction; each block has all of the tokens.

    The fewest programs that fill the card: each reads all of x and of B_down. The depths are those that do not spill.
    """
    cols = next((c for c in (64, 32) if 10 * _ceil(shape.n, c) >= 9 * programs(arch)), 16)
    rows, rank, warps = tokens(shape.m), block_r(shape.r), 4
    if rows == 1:  # one token also keeps x∘B_down in registers
        depth = DECODED // max(cols, 2 * rank if dtype == torch.float32 else rank)
    else:
        depth = min(256, DECODED // max(cols, rows)) // (2 if rows == 32 or rank > 16 else 1)
        if dtype == torch.float32:
            depth, warps = max(32, depth // 2), 8
    return {"cols": cols, "depth": depth, "num_warps": warps, "num_stages": 1}


def csrc_small_m(arch: str, dtype: torch.dtype, shape: Shape, sums: bool) -> dict[str, int]:
    """The configuration of csrc's product of few tokens over a 4-bit weight; `sums`: it also makes σ.

    warps_k: how many of a block's 8 warps share one set of rows and split K; the rest take other rows. Chosen so that
    blocks of W fill the card evenly. slices: parts of K in the low-rank path. x_staged: x is copied to shared memory.
    """
    m, n, k, rank = shape
    gemv = m <= GEMV_TOKENS
    rows_per_warp, span = (4, 1024) if gemv else (32, 128)  # csrc/maps.cuh: rows of W, and elements of K, per step
    padded = (m if m <= 2 else 4) if gemv else 8 * (1 << (_ceil(m, 8) - 1).bit_length())
    per_sm = 2 if padded <= (2 if gemv else 16) else 1  # blocks per multiprocessor: __launch_bounds__ of the kernels
    columns, pitch = rank + sums, 4 * _ceil(rank + sums, 4)
    limit, resident = SHARED_LIMIT.get(arch, 99 * 1024), programs(arch) * per_sm
    warps, item = 8, 16  # warps of a block; tokens (and columns) of one item of the low-rank path

    def shared(warps_k: int) -> int:
        partial = max(warps * padded * (4 if gemv else 36), warps * item * item)
        up = 4 * _ceil(warps // warps_k * rows_per_warp * (rank | 1), 4) if rank else 0
        return 4 * (partial + m * pitch + up)

    def cost(warps_k: int) -> float:
        sets = _ceil(n, warps // warps_k * rows_per_warp)
        return _ceil(sets, resident) * (_ceil(_ceil(k, span), warps_k) + 0.5)  # 0.5: the cost of a set itself

    # Eight warps on one set of rows always fit: B_up takes most of the memory, and the block has the fewest rows then.
    warps_k = min((w for w in (1, 2, 4, 8) if shared(w) <= limit), key=cost)
    staged = gemv and shared(warps_k) + 2 * m * k + 1024 <= limit // per_sm
    tiles = _ceil(m, item) * _ceil(columns, item)
    slices = min(32, _ceil(k, 16 * warps), resident // max(1, tiles), SCRATCH_FLOATS // max(1, m * pitch))
    return {
        "warps_k": warps_k, "slices": max(1, slices), "x_staged": int(staged),
        "shared_bytes": shared(warps_k) + (2 * m * k if staged else 0),
        "blocks": min(resident, _ceil(n, warps // warps_k * rows_per_warp)),
    }  # fmt: skip


def shared_grad(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_shared_grad_kernel`: rank, columns (a multiple of 8, for the dropout mask), tokens."""
    tall = block_r(shape.r, 64)
    if dtype == torch.float32:  # without the matrix unit, operands of products are held in registers
        warps = 8 if tall > 16 and arch in OLD else 4  # so that it does not spill
        return {"rows": tall, "cols": 32 if tall > 16 else 64, "depth": 32, "num_warps": warps, "num_stages": 2}
    return {"rows": tall, "cols": 64, "depth": 64, "num_warps": 4, "num_stages": 2 if arch.startswith("gfx") else 3}


def multi_rows(shape: Shape) -> int:
    """Rows of one adapter at a time: where there are few, most adapters have one or two. More would take wgmma.

    That is serialized where the dropped x is made in registers (`into_rank`).
    """
    return 16 if shape.m <= 512 else 32


def multi_shrink(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_multi_shrink_kernel`: rows of x or dy of one adapter, columns at a time."""
    rows = multi_rows(shape)
    if dtype == torch.float32:
        return {"rows": rows, "cols": 32, "num_warps": 8 if shape.r > 16 else 4, "num_stages": 2}
    stages = 2 if arch.startswith("gfx") else 4  # few programs hide the memory's latency by what each asks ahead
    return {"rows": rows, "cols": 64 if shape.r > 16 or rows > 16 else 128, "num_warps": 4, "num_stages": stages}


def multi_expand(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_multi_expand_kernel`: rows and columns of y or dx of one adapter."""
    cols = 64 if dtype == torch.float32 else 128
    return {"rows": multi_rows(shape), "cols": cols, "num_warps": 4, "num_stages": 2}


def multi_outer(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_multi_outer_kernel`: rows of one adapter at a time, columns of dy or x."""
    stages = 2 if arch.startswith("gfx") or shape.m <= 512 else 3
    return {"rows": 32, "cols": 32 if dtype == torch.float32 else 64, "num_warps": 4, "num_stages": stages}


def expert_rows(m: int, experts: int) -> int:
    """The class of the rows that an expert has on average, of M in all: up to 16, up to 64, or more (128)."""
    return next((most for most in (16, 64) if m <= most * experts), 128)


def expert_product(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_expert_product_kernel`: rows of an expert, columns of y or dx, depth. M: rows an expert."""
    rows = min(expert_rows(shape.m, 1), 128 if arch in ("sm_90", "sm_100") else 64)
    if dtype == torch.float32:
        return {"rows": min(rows, 32), "cols": 64, "depth": 32, "num_warps": 4, "num_stages": 2}
    stages = 2 if arch.startswith("gfx") else 4 if arch in ("sm_80", "sm_90", "sm_100") else 3
    return {"rows": rows, "cols": 128, "depth": 64, "num_warps": 8 if rows > 64 else 4, "num_stages": stages}


def bands(arch: str, rows: int, block: int, depth: int, step: int, most: int = MAX_BANDS) -> tuple[int, int]:
    """(number, width) of the bands of a reduction over `depth`, up to `most`: with few rows they give enough programs.

    The width is a multiple of `step`; no band is empty.
    """
    blocks = _ceil(rows, block)
    wanted = min(most, max(1, programs(arch) // max(1, blocks)), max(1, depth // step))
    width = max(1, _ceil(_ceil(depth, 1 << (wanted.bit_length() - 1)), step) * step)
    return max(1, _ceil(depth, width)), width


def row_splits(rows: int, blocks: int, block: int) -> int:
    """The number of parts of a sum over `rows`, so that about 256 programs run, each with work to do."""
    return max(1, min(256 // max(1, blocks), _ceil(rows, 4 * block)))


def _interpreted(kernel: str) -> dict[str, int]:
    """Small blocks for the interpreter; the large products take descriptors there where the operands allow it."""
    config = {"rows": 32, "cols": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    return config | _INTERPRETED.get(kernel, {})


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


_INTERPRETED: dict[str, dict[str, int]] = {
    "fwd": {"tma": True, "persistent": True, "parts": 2}, "dx": {"tma": True, "persistent": True, "parts": 2},
    "finish": {"tokens": 32}, "small_m": {"depth": 64}, "shared_grad": {"rows": 16},
}  # fmt: skip
"""Changes for single kernels to the blocks that all kernels have in the interpreter."""

Chosen = Callable[[str, torch.dtype, Shape], dict[str, int]]
"""(arch, dtype, shape) → a configuration."""


class Kernel(NamedTuple):
    """Kernels that share one launch configuration.

    Attributes:
        default: the configuration where nothing was measured.
        names: of the kernels.
        waits: what bounds its time: "products", whose instructions must come in batches; "memory", from which it reads
            x, dy or W once, in loads of 16 bytes where rows are aligned to that; "": neither.
        multiplies: every form that has ranks has a matrix product; other kernels may only read and add.
        tuned: `tune` measures it, and a table may have rows for it; the others take too little time.
    """

    default: Chosen
    names: tuple[str, ...] = ()
    waits: str = ""
    multiplies: bool = False
    tuned: bool = False


KERNELS: dict[str, Kernel] = {
    "fwd": Kernel(
        lambda arch, dtype, shape: large_product(arch, dtype, shape.m, shape.n),
        ("_glora_fwd_kernel", "_grouped_fwd_kernel"), "products", True, tuned=True,
    ),
    "dx": Kernel(
        lambda arch, dtype, shape: large_product(arch, dtype, shape.m, shape.k),
        ("_glora_dx_kernel", "_grouped_dx_kernel"), "products", True, tuned=True,
    ),
    "prepare": Kernel(into_rank, ("_prepare_kernel", "_grouped_down_kernel"), "memory", True, tuned=True),
    "added_terms": Kernel(added_terms, ("_added_terms_kernel",), multiplies=True, tuned=True),
    "dy": Kernel(dy_pass, ("_dy_kernel", "_grouped_dy_kernel"), "memory", tuned=True),
    "dy_mixed": Kernel(dy_mixed_pass),  # `_dy_kernel` where it also reads a y that holds more than Z
    "x": Kernel(x_pass, ("_x_kernel", "_grouped_x_kernel"), "memory", True, tuned=True),
    "hadamard_grad": Kernel(hadamard_grad, ("_hadamard_grad_kernel",), "products", True, tuned=True),
    "finish": Kernel(finish, ("_finish_kernel",)),
    "weight": Kernel(weight_pass, ("_wc_kernel", "_wc_grad_kernel", "_c_grad_kernel")),  # and W_eff, U in "prepare"
    "dequantize": Kernel(dequantize, ("_dequantize_kernel", "_dequantize_adapted_kernel")),
    "small_m": Kernel(small_m, ("_small_m_kernel",), tuned=True),
    "shared_grad": Kernel(shared_grad, ("_shared_grad_kernel",), multiplies=True),
    "multi_shrink": Kernel(multi_shrink, ("_multi_shrink_kernel",)),
    "multi_expand": Kernel(multi_expand, ("_multi_expand_kernel",)),
    "multi_outer": Kernel(multi_outer, ("_multi_outer_kernel",)),
    "expert_product": Kernel(expert_product, ("_expert_product_kernel",), "products", True),
}  # fmt: skip
"""The Triton kernels for which `tables.choose` has a configuration."""

CSRC: dict[str, Chosen] = {
    "small_m csrc": functools.partial(csrc_small_m, sums=False),
    "small_m csrc sums": functools.partial(csrc_small_m, sums=True),
}
"""The kernels of csrc for which `tables.choose` has a configuration."""

TUNED = tuple(name for name, kernel in KERNELS.items() if kernel.tuned)

_KEYS = {name: key for key, kernel in KERNELS.items() for name in kernel.names}


def key_of(kernel: str) -> str:
    """The key in `KERNELS` of the kernel of this name; "" where it has no configuration."""
    return _KEYS.get(kernel, "")
