"""The low-rank products of a group of LoRA layers, before and after the large ones, each in one launch.

The grid covers the members or the paths (the distinct low-rank inputs) of the group; a program picks its own entries of
the tuples of operands. The launchers allocate nothing.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.grouped import members
from glora_kernels.operands import Matrix
from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, factor_depth, halves, matrix, numerics, options
from glora_kernels.runtime.spills import Beside, fitted


@triton.jit(do_not_specialize=["M"])
def _grouped_down_kernel(
    xs, downs, hs, M, Ms, Ks, Rs, scales, masks,
    NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h_t (M,R) = s_t·drop_t(x_t)·down_tᵀ of every path t, each with its own mask."""
    # Neighbouring programs take all paths of one block of rows, so that they read it from the L2.
    t = tl.program_id(0) % len(xs)
    m = tl.program_id(0) // len(xs) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    rows = members.rows_of(M, Ms, t)
    K = members.pick(Ks, t)
    R = members.pick(Rs, t)
    x = members.pick_rows(xs, t)
    down = Matrix(members.pick(downs, t), 1, K)
    scale = members.pick(scales, t)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tile.read(x, m, k, rows, K)
        if masks is not None:
            seed = tile.seed_of(members.pick(masks.seeds, t))
            x_tile = tile.dropped(x_tile, seed, m, k0, tl.cast(masks.threshold, tl.int32), 1.0, BLOCK_M, BLOCK_K)
        acc = tile.dot_thin(x_tile, tile.read(down, k, r, K, R).to(tile.dtype_of(NUMERICS.factor_name)), acc, NUMERICS)
    if masks is not None:
        scale *= masks.inv_keep
    tile.write(Matrix(members.pick(hs, t), R, 1), acc * scale, m, r, rows, R)


def grouped_down_launch(
    xs: Sequence[Tensor], downs: Sequence[Tensor], hs: Sequence[Tensor],
    *, scales: Sequence[float], dropout_p: float = 0.0, seeds: Sequence[Tensor | int] = (), arch: str,
) -> Launch:  # fmt: skip
    """h_t (M,R) = s_t·drop_t(x_t)·down_tᵀ of every path."""
    rank, k_max = max(down.shape[0] for down in downs), max(x.shape[1] for x in xs)
    sizes = members.row_counts(xs)
    how = numerics(xs[0].dtype, *downs)
    shape = Shape(configs.m_class(sizes["M"]), k_max, k_max, rank)
    config = tables.choose("prepare", arch, xs[0].dtype, shape)
    config = fitted("grouped_down", config, Beside(arch, xs[0].dtype, rank, halves=halves(how)))
    args = {
        "xs": tuple(map(matrix, xs)), "downs": tuple(downs), "hs": tuple(hs),
        **sizes, "Ks": tuple(x.shape[1] for x in xs), "Rs": tuple(down.shape[0] for down in downs),
        "scales": tuple(map(float, scales)), "masks": members.masks(dropout_p, seeds),
        "NUMERICS": how,
        "BLOCK_M": config["rows"], "BLOCK_K": factor_depth(config, how), "BLOCK_R": configs.block_r(rank),
    }  # fmt: skip
    grid = (cdiv(sizes["M"], config["rows"]) * len(xs),)
    return Launch(_grouped_down_kernel, grid, args, options(config, args))


@triton.jit(do_not_specialize=["M", "band_width"])
def _grouped_dy_kernel(
    dys, ups, hs, ss, first_bands, parts, part_split, part_row, M, Ms, Ns, Rs, scales, band_width,
    WITH_G: tl.constexpr, RANK_BLOCKS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One read of every dy_i: over a band of N, S_i[first band + band] (M,R) = s_i·dy_i·up_i, and sums along M.

    parts_i (splits,·,N), columns of one tensor, holds sums over the rows of a program: Σ dy_i (WITH_G), then dy_iᵀh_i
    with `hs`, for one block of the rank. A program beyond the rows of its member stores zeros there, since other
    members may have more rows. `band_width` is a multiple of BLOCK_N.
    """
    # Blocks of S's columns have programs of their own, neighbours in time, so that they share dy in the L2.
    i = tl.program_id(0) // RANK_BLOCKS
    rank_block = tl.program_id(0) % RANK_BLOCKS
    band = tl.program_id(1)
    g = tl.program_id(2)
    rows = members.rows_of(M, Ms, g)
    N = members.pick(Ns, g)
    R = members.pick(Rs, g)
    dy = members.pick_rows(dys, g)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # Sᵀ and not S: with 16 rows (of the rank) the product stays on mma.sync, which takes dy as it is in registers.
    s_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    if parts is not None:
        part = members.pick(parts, g) + tl.cast(i, tl.int64) * part_split
    if hs is not None:
        h = tile.read(Matrix(members.pick(hs, g), 1, R), r, m, R, rows).to(tile.dtype_of(NUMERICS.factor_name))
    first = tl.multiple_of(band * band_width, BLOCK_N)
    for n0 in range(first, tl.minimum(first + band_width, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dy_tile = tile.read(dy, m, n, rows, N)
        if ss is not None:
            factor = tile.read(Matrix(members.pick(ups, g), 1, R), r, n, R, N).to(tile.dtype_of(NUMERICS.factor_name))
            s_acc = tile.dot_thin(factor, dy_tile.T, s_acc, NUMERICS)
        if WITH_G:
            if rank_block == 0:
                tl.store(part + n, tl.sum(dy_tile.to(tl.float32), 0), mask=n < N)
        if hs is not None:
            value = tile.dot_thin(h, dy_tile, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), NUMERICS)
            tile.write(Matrix(part + part_row if WITH_G else part, part_row, 1), value, r, n, R, N)
    if ss is not None:
        s = members.pick(ss, g) + tl.cast(rows, tl.int64) * R * (members.pick(first_bands, g) + band)
        tile.write(Matrix(s, 1, R), s_acc * members.pick(scales, g), r, m, R, rows)


def grouped_dy_launch(
    dys: Sequence[Tensor],
    *, ups: Sequence[Tensor | None], hs: Sequence[Tensor | None], ss: Sequence[Tensor | None],
    first_bands: Sequence[int], parts: Sequence[Tensor] | None, with_g: bool, scales: Sequence[float],
    factors: torch.dtype | None = None, shape: Shape, bands: tuple[int, int], arch: str,
) -> Launch:  # fmt: skip
    """S_i (·,M,R) = s_i·dy_i·up_i from its first band on, and part_i (splits,·,N): Σ dy_i (`with_g`), then dy_iᵀh_i.

    dy_iᵀh_i only with `hs`. The parts are columns of one tensor, and `shape` is the largest of the members.
    """
    sizes = members.row_counts(dys)
    config = _dy_config(shape._replace(m=configs.m_class(sizes["M"])), dys[0].dtype, arch, factors)
    ranks = tuple(0 if up is None else up.shape[1] for up in ups)
    part_split, part_row = (0, 0) if parts is None else parts[0].stride()[:2]
    args = {
        "dys": tuple(map(matrix, dys)),
        "ups": members.addresses(ups), "hs": members.addresses(hs), "ss": members.addresses(ss),
        "first_bands": tuple(first_bands),
        "parts": None if parts is None else tuple(parts), "part_split": part_split, "part_row": part_row,
        **sizes, "Ns": tuple(dy.shape[1] for dy in dys), "Rs": ranks,
        "scales": tuple(map(float, scales)), "band_width": bands[1],
        "WITH_G": with_g, **_rank_blocks(max(ranks)), "NUMERICS": numerics(dys[0].dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"],
    }  # fmt: skip
    grid = (cdiv(sizes["M"], config["rows"]) * args["RANK_BLOCKS"], bands[0], len(dys))
    return Launch(_grouped_dy_kernel, grid, args, options(config, args))


def grouped_dy_sizes(
    shape: Shape, members: int, sharing: int, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> tuple[int, int, int]:
    """(splits of M, bands of N, width of a band): the leading sizes of what `grouped_dy_launch` fills.

    The members' programs run at the same time, so that each member needs fewer bands than alone. Where up to `sharing`
    members write to one S, they get at most `most_bands` bands together if possible, but each at least one.
    """
    shape = shape._replace(m=configs.m_class(m := shape.m))
    config = _dy_config(shape, dtype, arch, factors)
    most = max(1, most_bands(shape.r) // max(1, sharing))
    step = cdiv(cdiv(shape.n, most), config["cols"]) * config["cols"]
    number, width = configs.bands(arch, members * shape.m, config["rows"], shape.n, max(step, config["cols"]))
    return cdiv(m, config["rows"]), number, width


def most_bands(rank: int) -> int:
    """The most bands of S that `_grouped_x_kernel` can read: so many fit in its shared memory, in fp32."""
    return max(1, min(configs.MAX_BANDS, 192 // configs.block_r(rank, configs.RANK_BLOCK)))


def _dy_config(shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None) -> dict[str, int]:
    config = tables.choose("dy", arch, dtype, shape)
    return fitted("grouped_dy", config, Beside(arch, dtype, shape.r, halves=halves(numerics(dtype, factors))))


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _grouped_x_kernel(
    xs, ss, sums, parts, part_split, part_row, M, Ms, Ks, Rs, masks, rows_per_split,
    BANDS: tl.constexpr, RANK_BLOCKS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """part_t (splits,R,K) = S_tᵀ·drop_t(x_t) of every path, over the rows of each split; S_t (BANDS,M,R).

    The rows of a part are `part_row` apart, K_t if that is None. With `sums`, the programs of the first columns store
    Σ_bands S_t in `sums_t` (M,R), for dx, each tile of which would otherwise sum them again.
    """
    t = tl.program_id(2)
    k0 = tl.program_id(0) // RANK_BLOCKS * BLOCK_K
    rows = members.rows_of(M, Ms, t)
    K = members.pick(Ks, t)
    R = members.pick(Rs, t)
    if k0 < K:
        x = members.pick_rows(xs, t)
        s = Matrix(members.pick(ss, t), R, 1)
        k = k0 + tl.arange(0, BLOCK_K)
        r = tl.program_id(0) % RANK_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        first = tl.program_id(1) * rows_per_split
        last = tl.minimum(first + rows_per_split, rows)
        m = first + tl.arange(0, BLOCK_M)
        s_tile = tile.read_banded(s, r, m, R, last, rows, BANDS, TRANSPOSED=True).to(
            tile.dtype_of(NUMERICS.factor_name)
        )
        for m0 in range(first, last, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            x_tile = tile.read(x, m, k, last, K)
            if masks is not None:
                seed = tile.seed_of(members.pick(masks.seeds, t))
                x_tile = tile.dropped(x_tile, seed, m, k0, tl.cast(masks.threshold, tl.int32), 1.0, BLOCK_M, BLOCK_K)
            acc = tile.dot_thin(s_tile, x_tile, acc, NUMERICS)
            # Loaded one step ahead, as in `tile.thin_product`.
            s_tile = tile.read_banded(s, r, m + BLOCK_M, R, last, rows, BANDS, TRANSPOSED=True).to(
                tile.dtype_of(NUMERICS.factor_name)
            )
        if masks is not None:
            acc *= masks.inv_keep
        part = members.pick(parts, t) + tl.cast(tl.program_id(1), tl.int64) * part_split
        tile.write(Matrix(part, K if part_row is None else part_row, 1), acc, r, k, R, K)
        if sums is not None:
            if k0 == 0:  # a loop of its own, since a branch inside the loop above would serialize its wgmma
                for m0 in range(first, last, BLOCK_M):
                    m = m0 + tl.arange(0, BLOCK_M)
                    total = tile.read_banded(s, r, m, R, last, rows, BANDS, TRANSPOSED=True)
                    tile.write(Matrix(members.pick(sums, t), 1, R), total, r, m, R, last)


def grouped_x_launch(
    xs: Sequence[Tensor],
    *, ss: Sequence[Tensor], sums: Sequence[Tensor] | None = None, parts: Sequence[Tensor], dropout_p: float = 0.0,
    seeds: Sequence[Tensor | int] = (), factors: torch.dtype | None = None, shape: Shape, splits: int, arch: str,
) -> Launch:  # fmt: skip
    """part_t (splits,R,K) = S_tᵀ·drop_t(x_t) over the rows of each split, S (bands,M,R); `shape` is the largest.

    Σ_bands S_t goes to `sums` (M,R) if given. Products with S are in the dtype of x, or of `factors` where that is
    wider.
    """
    sizes = members.row_counts(xs)
    config = tables.choose("x", arch, xs[0].dtype, shape._replace(m=configs.m_class(sizes["M"])))
    aligned = all(x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in xs)
    beside = Beside(arch, xs[0].dtype, shape.r, drops=dropout_p > 0.0, aligned=aligned)
    config = fitted("grouped_x", config, beside)
    ranks = tuple(s.shape[2] for s in ss)
    columns = tuple(x.shape[1] for x in xs)
    rows_of = tuple(part.stride(1) for part in parts)
    args = {
        "xs": tuple(map(matrix, xs)), "ss": tuple(ss), "sums": None if sums is None else tuple(sums),
        "parts": tuple(parts), "part_split": parts[0].stride(0), "part_row": None if rows_of == columns else rows_of[0],
        **sizes, "Ks": columns, "Rs": ranks, "masks": members.masks(dropout_p, seeds),
        "rows_per_split": cdiv(cdiv(sizes["M"], splits), config["rows"]) * config["rows"],
        "BANDS": ss[0].shape[0], **_rank_blocks(max(ranks)), "NUMERICS": numerics(xs[0].dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"],
    }  # fmt: skip
    grid = (cdiv(shape.k, config["cols"]) * args["RANK_BLOCKS"], splits, len(xs))
    return Launch(_grouped_x_kernel, grid, args, options(config, args))


@triton.jit(do_not_specialize=["M", "bands"])
def _grouped_bands_kernel(ss, sums, M, Ms, Rs, bands, BLOCK: tl.constexpr):
    """sums_t (M,R) = Σ_bands S_t of every path, where `_grouped_x_kernel` cannot do it."""
    t = tl.program_id(1)
    size = tl.cast(members.rows_of(M, Ms, t), tl.int64) * members.pick(Rs, t)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for band in range(bands):
        total += tl.load(members.pick(ss, t) + band * size + i, mask=i < size, other=0.0)
    out = members.pick(sums, t)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


def grouped_bands_launch(ss: Sequence[Tensor], sums: Sequence[Tensor]) -> Launch:
    """sums_t (M,R) = Σ_bands S_t, S (bands,M,R)."""
    sizes = members.row_counts(sums)
    block = 32 if environment.interpreting() else 1024
    args = {
        "ss": tuple(ss), "sums": tuple(sums), **sizes, "Rs": tuple(s.shape[2] for s in ss), "bands": ss[0].shape[0],
        "BLOCK": block,
    }  # fmt: skip
    grid = (cdiv(sizes["M"] * max(s.shape[2] for s in ss), block), len(ss))
    return Launch(_grouped_bands_kernel, grid, args, {"num_warps": 4, "num_stages": 1})


def _rank_blocks(rank: int) -> dict[str, int]:
    """BLOCK_R: the columns of S that one program computes or reads; RANK_BLOCKS: how many such blocks there are."""
    block = configs.block_r(rank, configs.RANK_BLOCK)
    return {"RANK_BLOCKS": max(1, cdiv(rank, block)), "BLOCK_R": block}
