"""Launch configurations: pure functions of kernel, architecture, dtype and shape. Nothing is tuned on a first call.

`arch` is "sm_80", "sm_89", "sm_90", "sm_100", "gfx942" …, or "cpu" in the interpreter. Shared memory a block, the
bound on BLOCK_* × stages: 163 KiB on sm_80, 99 KiB on sm_86/sm_89, 227 KiB on sm_90 and sm_100, 64 KiB on gfx942.
A configuration is a dictionary: blocks (`rows`, `cols`, `depth` of a product's tile), num_warps, num_stages and, for
the two large products, tma, persistent and parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

OLD = ("sm_80", "sm_86", "sm_89")
"""Cards without wgmma, whose matrix instructions read their operands from registers."""

TOTALS_BESIDE_DX = ("sm_90", "sm_100", "cpu")
"""Where `_glora_dx_kernel` also sums the gradients of constants; elsewhere its pointers leave no register for that."""

MAX_RANK = 256
"""Up to this rank the kernels hold a low-rank factor's columns in registers."""

MAX_FACTOR_RANK = 32
"""Up to this rank `_dy_kernel` takes dyᵀh as well; above, its partial sums would move more than reading dy again."""

RANK_BLOCK = 64
"""The most columns of S that one program makes, or multiplies x by; there are more programs of a larger rank."""

MAX_BANDS = 8
"""The most parts of the reduction over which h, S, σ and τ are partial sums that the next kernel adds."""

PROGRAMS = {"cpu": 4, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of the largest card of an architecture."""

TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (64, 32))
"""Rows and columns of a large product's tile in 16 bits, from the one that reads least to the smallest."""

READING = {"sm_90": 60, "sm_100": 80}
"""How many products of 16 bits a multiprocessor makes while it reads one number, by datasheet; 25 on older cards."""

READERS = 0.6
"""The share of the multiprocessors whose reading takes all that the L2 gives: an estimate."""

M_CLASSES = (64, 512, 2048, 4096)
"""The largest M of each class, which stands for it; the last stands for all above the one before."""

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
    """The number of rows that stands for M wherever something is chosen by it: one of a few.

    So many configurations, and compilations, there are; what is computed with M itself are only sizes and grids.
    """
    return next((most for most in M_CLASSES if m <= most), M_CLASSES[-1])


def tokens(m: int) -> int:
    """One token, or the padded number of a few: a power of two from 16, which a matrix instruction takes.

    The finer class of M up to the first of `M_CLASSES`, for the product of few tokens over a 4-bit weight.
    """
    return 1 if m == 1 else block_r(m)


def representative(m: int) -> int:
    """The M that a program of launches is planned for (`runtime.program`): nothing is chosen by a finer class."""
    return tokens(m) if m <= M_CLASSES[0] else m_class(m)


def classes(most: int) -> list[int]:
    """A number of rows of each class that `representative` makes of those up to `most`: the largest there is."""
    found: list[int] = []
    m = 1
    while m <= most and (top := representative(m)) >= m:
        found.append(min(top, most))
        m = top + 1
    return found


def block_r(rank: int, limit: int = 256) -> int:
    """The padded rank of one step: a power of two from 16, the smallest a matrix instruction takes."""
    return max(16, min(limit, 1 << (rank - 1).bit_length()))


def programs(arch: str) -> int:
    """How many programs keep the card busy at one a multiprocessor."""
    return PROGRAMS.get(arch, 108)


def default(
    kernel: str, arch: str, dtype: torch.dtype, shape: Shape, weight_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of a kernel of `KERNELS`.

    Under autocast the weight may be wider than x (`weight_dtype`) and fills the stages in its own width.
    """
    if kernel in ("fwd", "dx"):
        mixed = weight_dtype is not None and weight_dtype.itemsize > dtype.itemsize
        return large_product(arch, dtype, shape.m, shape.n if kernel == "fwd" else shape.k, mixed)
    return _interpreted(kernel) if arch == "cpu" else KERNELS[kernel](arch, dtype, shape)


def large_product(
    arch: str, dtype: torch.dtype, rows: int, cols: int, mixed: bool = False, tma: bool = True
) -> dict[str, int]:
    """Tile of `_glora_fwd_kernel` and `_glora_dx_kernel` for a (rows, cols) output: the largest that fills the card.

    `parts`: in how many parts of its columns a tile is finished and stored. Without `tma`, or where the operands do not
    allow it (`mixed`: a weight wider than x; strides off 16 bytes), the operands are read by pointers.
    """
    if arch == "cpu":
        return _interpreted("fwd") | {"tma": tma and not mixed}
    through_tma = tma and not mixed and arch in ("sm_90", "sm_100") and dtype != torch.float32
    # cp.async fills the pipe best with two programs a multiprocessor, which persistence would forbid.
    way = {"tma": through_tma, "persistent": through_tma}
    if dtype == torch.float32:
        warps = 8 if arch == "sm_90" else 4  # what does not spill
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": warps, "num_stages": 2, "parts": 1, **way}
    # On sm_100 the full epilogue spills beside 128x256.
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
    """How long a (rows, cols) product takes in tiles of (tall, wide), in products of one program: an estimate.

    A program waits for its products or for what it reads, which takes longer where many read at once; and the card for
    the last of them.
    """
    tiles, here = _ceil(rows, tall) * _ceil(cols, wide), programs(arch)
    crowd = max(1.0, min(tiles, here) / (READERS * here))
    return _ceil(tiles, here) * max(tall * wide, int((tall + wide) * READING.get(arch, 25) * crowd))


def into_rank(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_prepare_kernel`: rows of x, depth of the reduction.

    Few rows keep it on mma.sync: the dropped x is made in registers, from where wgmma would be serialized, and a
    kernel that waits for memory gains nothing from wgmma. The fewer they are, the more programs read x, each far ahead;
    but each also reads all of a factor, which of a large rank is as much again.
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
    """Blocks of `_dy_kernel`: rows and columns of dy at a time.

    Every program leaves one partial sum (R, N) behind, written and read in fp32: with 128 rows that is R/32 of the
    bytes of a 16-bit dy itself. So above `MAX_FACTOR_RANK` dyᵀh is taken by `_x_kernel`, from a second read of dy.
    """
    if dtype == torch.float32:
        cols = 32 if shape.r > MAX_FACTOR_RANK else 64
        return {"rows": 32, "cols": cols, "num_warps": 8, "num_stages": 1 if arch.startswith("gfx") else 2}
    amd = arch.startswith("gfx")
    stages = 2 if amd else 4  # so few programs hide the memory's latency by what each asks ahead
    if shape.r > MAX_FACTOR_RANK:  # in one band of N
        rows = 32 if shape.m <= 512 else 64
        return {"rows": rows, "cols": 64, "num_warps": 4, "num_stages": 1 if amd else stages}
    rows = 64 if amd or shape.m < 2048 else 128
    return {"rows": rows, "cols": 64, "num_warps": 8 if shape.r > 16 else 4, "num_stages": stages}


def dy_mixed_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_dy_kernel` where it takes out of y what is no part of Z: a tile more of each in registers."""
    config = dy_pass(arch, dtype, shape)
    if arch.startswith("gfx"):
        config = config | {"cols": 32}  # what does not spill
    if dtype == torch.float32:
        return config | {"rows": 32, "num_warps": 8}
    return config | {"rows": min(config["rows"], 64 if arch == "sm_100" else 128), "num_warps": 8}


def x_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_x_kernel`: rows of x at a time, columns. Wide ones, as each block of columns reads all of S."""
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
        warps = 8 if arch in ("sm_90", "sm_100") else 4  # what does not spill
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": warps, "num_stages": 2}
    stages = 3 if arch in ("sm_80", "sm_90", "sm_100") else 2
    return {"rows": 128, "cols": 128, "depth": 64, "num_warps": 8, "num_stages": stages}


def finish(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_finish_kernel`: rows and columns of the gradients; tokens and depth of the product seldom made."""
    if dtype == torch.float32:  # it spills at the sizes that 16 bits take
        return {"rows": 32, "cols": 32, "tokens": 32, "depth": 32, "num_warps": 8, "num_stages": 2}
    warps = 8 if arch == "sm_80" else 4
    return {"rows": 32, "cols": 32, "tokens": 128, "depth": 64, "num_warps": warps, "num_stages": 2}


def weight_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of W where it is read once: W_eff, U, W·c and Wᵀg."""
    cols = 32 if dtype == torch.float32 else (64 if arch == "sm_100" else 128)
    return {"rows": 16 if dtype == torch.float32 else 32, "cols": cols, "num_warps": 4, "num_stages": 2}


def dequantize(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of W where it is made of 4 bits: rows and columns where terms are added, else their product at a time.

    `depth` is a step of the rank.
    """
    if dtype == torch.float32:
        return {"rows": 32, "cols": 64, "depth": 16, "num_warps": 4, "num_stages": 2}
    return {"rows": 32, "cols": 128, "depth": 32, "num_warps": 4, "num_stages": 2}


class Beside(NamedTuple):
    """What a launch holds in registers beside what its configuration was made for.

    rank: the largest. halves: factors in fp32 are multiplied beside 16 bits. drops: masks are drawn. aligned: rows are
    known to begin at multiples of 16 bytes. nested: the absmax of 4-bit codes is in 8 bits. rows: of the configuration.
    """

    arch: str
    dtype: torch.dtype
    rank: int = 0
    halves: bool = False
    drops: bool = False
    aligned: bool = True
    nested: bool = False
    rows: int = 0

    @property
    def single(self) -> bool:
        return self.dtype == torch.float32

    @property
    def old(self) -> bool:
        return self.arch in OLD

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def newest(self) -> bool:
        return self.arch == "sm_100"

    @property
    def wide(self) -> bool:
        """Of a read of x: whether more warps have to share its rows."""
        return (self.rank > 16 and self.single) or not self.aligned


class Most(int):
    """No more than this, where a rule has it in the place of a number."""


_REGISTERS = {"maxnreg": 255}
"""For a kernel of which ptxas would spill a few bytes to have more programs run at once."""

RULES: dict[str, tuple[tuple[Callable[[Beside], bool], dict[str, int]], ...]] = {
    "prepare": (
        (lambda b: b.drops and b.rank > 32 and not b.single, {"num_warps": 8}),
        (lambda b: b.halves and b.newest, _REGISTERS),
    ),
    "added_terms": (
        (lambda b: b.halves and b.newest, _REGISTERS),
        (lambda b: b.halves and b.amd, {"cols": Most(32)}),
    ),
    "down": (  # of a group, as "dy", "x" and "dx"
        (lambda b: b.rank > 16, {"num_warps": 8}),
        (lambda b: b.rank > 16 and b.single, {"rows": 16}),
        (lambda b: b.rank > 16 and b.single and not b.amd, {"depth": 64}),
        (lambda b: b.rank <= 16 and b.halves, {"num_stages": Most(2)}),
        (lambda b: b.rank <= 16 and b.halves and b.newest, _REGISTERS),
    ),
    "dy": ((lambda b: b.single, {"rows": Most(32)}),),
    "x": (
        (lambda b: b.wide, {"num_warps": 8}),
        (lambda b: not b.wide and (b.drops or b.rank > (32 if b.newest else 64)), _REGISTERS),
    ),
    "dx": (
        (lambda b: b.old and not b.single, _REGISTERS),
        (lambda b: b.amd and not b.halves, {"part": 32}),
        (lambda b: b.newest and b.drops and b.halves, {"cols": Most(64)}),
    ),
    "hadamard_grad": (  # on sm_89 wider ones beside halves would also take more memory than there is
        (lambda b: (b.halves and (b.old or b.newest)) or not b.aligned, {"cols": Most(64)}),
        (lambda b: b.single and not b.aligned, {"cols": Most(32)}),
    ),
    "dequantize": ((lambda b: b.newest, {"num_warps": 8}),),
    "small_m": (
        (lambda b: (b.halves and b.rows == 64) or (b.rank > 32 and b.rows == 32), {"depth": Most(64)}),
        (lambda b: b.nested and b.newest, _REGISTERS),
    ),
    "shared_grad": (
        (lambda b: b.drops or not b.aligned, _REGISTERS),
        (lambda b: (b.drops or b.halves or not b.aligned) and b.old and b.rows > 16, {"cols": 32}),
    ),
}
"""By kernel: where a configuration would spill, and what is changed in it then, by every rule that holds. `part`: the
columns of a part of a tile. Every change was found by compiling (`tools.aot`)."""


def fitted(
    kernel: str,
    config: dict[str, int],
    arch: str,
    dtype: torch.dtype,
    rank: int = 0,
    *,
    halves: bool = False,
    drops: bool = False,
    aligned: bool = True,
    nested: bool = False,
) -> dict[str, int]:
    """The configuration of a kernel of `RULES` beside operands that would make it spill: see `Beside`."""
    beside = Beside(arch, dtype, rank, halves, drops, aligned, nested, config["rows"])
    for holds, change in RULES[kernel]:
        if holds(beside):
            for name, value in change.items():
                if name == "part":
                    config = config | {"parts": max(1, config["cols"] // value)}
                elif name != "maxnreg" or arch.startswith("sm_"):
                    config = config | {name: min(value, config[name]) if isinstance(value, Most) else value}
    return config


def bands(arch: str, rows: int, block: int, depth: int, step: int, most: int = MAX_BANDS) -> tuple[int, int]:
    """(number, width) of up to `most` bands of a reduction over `depth`, so that a few rows still make enough programs.

    A width is a multiple of `step`, and every band has something in it.
    """
    blocks = _ceil(rows, block)
    wanted = min(most, max(1, programs(arch) // max(1, blocks)), max(1, depth // step))
    width = max(1, _ceil(_ceil(depth, 1 << (wanted.bit_length() - 1)), step) * step)
    return max(1, _ceil(depth, width)), width


def narrow(config: dict[str, int]) -> dict[str, int]:
    """A large product's tile of at most 128 columns, where what is done to a wider one would spill."""
    return config | {"cols": 128, "parts": 2} if config["cols"] > 128 else config


def beside_pairs(config: dict[str, int], arch: str) -> dict[str, int]:
    """A large product's tile beside two pairs of factors, in bands or multiplied as halves: what does not spill."""
    if arch != "sm_90":
        return narrow(config)
    cols = min(128, config["cols"])
    return config | {"rows": min(64, config["rows"]), "cols": cols, "parts": max(1, cols // 32), "num_warps": 8}


def all_registers(config: dict[str, int], arch: str) -> dict[str, int]:
    """The configuration, with all the registers that a thread may have."""
    return config | _REGISTERS if arch.startswith("sm_") else config


def row_splits(rows: int, blocks: int, block: int) -> int:
    """Into how many parts a sum over `rows` is split so that about 256 programs run, each with work to do."""
    return max(1, min(256 // max(1, blocks), _ceil(rows, 4 * block)))


def _interpreted(kernel: str) -> dict[str, int]:
    """Small blocks for the interpreter; the large products take descriptors there where the operands allow it."""
    config = {"rows": 32, "cols": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    if kernel == "finish":
        config["tokens"] = 32
    if kernel in ("fwd", "dx"):
        config |= {"tma": True, "persistent": True, "parts": 2}
    return config


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


KERNELS: dict[str, Callable[[str, torch.dtype, Shape], dict[str, int]]] = {
    "fwd": lambda arch, dtype, shape: large_product(arch, dtype, shape.m, shape.n),
    "dx": lambda arch, dtype, shape: large_product(arch, dtype, shape.m, shape.k),
    "prepare": into_rank, "added_terms": added_terms, "dy": dy_pass, "dy_mixed": dy_mixed_pass, "x": x_pass,
    "hadamard_grad": hadamard_grad, "finish": finish, "weight": weight_pass, "dequantize": dequantize,
}  # fmt: skip
"""(arch, dtype, shape) → the configuration of a kernel; "weight" serves W_eff, U and W·c, "dy_mixed" a read of dy and
of a y that holds more than Z."""

TUNED = ("fwd", "dx", "prepare", "added_terms", "dy", "x", "hadamard_grad")
"""The kernels that are measured, of which a table may have a row; the others take no time worth it."""
