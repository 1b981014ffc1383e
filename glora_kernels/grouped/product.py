"""The two large products of a group of LoRA layers, each in one launch.

With pointers, a program picks the entries of its member (`members.pick`), for any number of members. Tensor descriptors
(TMA) cannot be picked at run time or put in a tuple: each of up to four members then has its own copy of the loop, and
the tuples of pointers are None. In both products a weight is (columns of the result, depth), with contiguous rows
(COLS_FIRST) or columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from glora_kernels import tile
from glora_kernels.glora.product import (
    GROUP,
    MAX_DESCRIBED,
    RANK_BLOCK,
    for_operands,
    left_operand,
    out_operand,
    product_launch,
    right_operand,
    tile_arguments,
    tiles_of,
)
from glora_kernels.grouped import members
from glora_kernels.operands import Matrix, Path, Vector
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, halves, numerics
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _fwd_tile(
    t, x, w, y, low, down, bias, M, N, K,
    TMA: tl.constexpr, COLS_FIRST: tl.constexpr, PARTS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of one member's y (M,N) = x·Wᵀ + h·upᵀ + bias; with `down`, h = s·x·downᵀ in the same loop."""
    i, j = tile.place_of(t, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), _GROUP)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if down is None:
        acc = tile.product(
            acc, x, w, None, i * BLOCK_M, j * BLOCK_N, M, N, K, TMA, COLS_FIRST, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        r = tl.arange(0, BLOCK_R)
        n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            a = tile.left_block(x, i * BLOCK_M, m, k0, k, M, K, TMA)
            b = tile.right_block(w, j * BLOCK_N, n, k0, k, N, K, TMA, COLS_FIRST, NUMERICS)
            factor = tile.read(Matrix(down, 1, K), k, r, K, low.rank).to(tile.dtype_of(NUMERICS.factor_name))
            acc = tile.dot_wide(a, b, acc, NUMERICS)
            h = tile.dot_thin(a, factor, h, NUMERICS)
        h = (low.scale * h).to(tile.dtype_of(NUMERICS.factor_name))
        if (j == 0) & (low.leaves != 0):
            tile.write(Matrix(low.h, low.rank, 1), h, m, r, M, low.rank)
    parts = tile.column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for q in tl.static_range(PARTS):
        part = parts[q]
        n0 = j * BLOCK_N + q * (BLOCK_N // PARTS)
        n = n0 + tl.arange(0, BLOCK_N // PARTS)
        if low is not None:
            up = Matrix(low.up, low.rank, 1)
            if down is None:
                part += tile.thin_product(
                    Matrix(low.h, low.rank, 1), up, m, n, M, N, low.rank, low.rank, 1, NUMERICS,
                    BLOCK_M, BLOCK_N // PARTS, 16,
                )  # fmt: skip
            else:
                part += tile.times_factor(h, up, n, N, low.rank, NUMERICS, BLOCK_M, BLOCK_N // PARTS, BLOCK_R)
        if bias is not None:
            part += tile.read_vector(Vector(bias.ptr, 1), n, bias.size)[None, :]
        tile.put(y if TMA else Matrix(y, N, 1), part, i * BLOCK_M, n0, m, n, M, N, TMA, NUMERICS)


@triton.jit(do_not_specialize=["M", "tiles"])
def _grouped_fwd_kernel(
    x0, x1, x2, x3, w0, w1, w2, w3, y0, y1, y2, y3, xs, ws, ys, lows, downs, biases, M, Ms, Ns, Ks, tiles,
    COLS_FIRST: tl.constexpr, PARTS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y_i = x_i·W_iᵀ + h_i·up_iᵀ + bias_i of every member; h_i = s_i·x_i·down_iᵀ, or read where `downs` is None.

    Where some members have a bias or a low-rank pair, the others have one of size or rank 0, whose address is never
    read.
    """
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if xs is None:
            first = t * 0
            x_list = (x0, x1, x2, x3)
            w_list = (w0, w1, w2, w3)
            y_list = (y0, y1, y2, y3)
            for g in tl.static_range(len(Ns)):
                rows = members.rows_of(M, Ms, g)
                count = members.tiles(rows, Ns[g], BLOCK_M, BLOCK_N)
                if (t >= first) & (t < first + count):
                    _fwd_tile(
                        t - first, x_list[g], w_list[g], y_list[g], None if lows is None else lows[g],
                        None if downs is None else downs[g], None if biases is None else biases[g],
                        rows, Ns[g], Ks[g], True, COLS_FIRST, PARTS, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                first += count
        else:
            g, start = members.member_of(t, M, Ms, Ns, BLOCK_M, BLOCK_N)
            _fwd_tile(
                t - start, members.pick_rows(xs, g), members.pick_weight(ws, g, COLS_FIRST), members.pick(ys, g),
                None if lows is None else members.pick_low(lows, g), None if downs is None else members.pick(downs, g),
                None if biases is None else members.pick_bias(biases, g),
                members.rows_of(M, Ms, g), members.pick(Ns, g), members.pick(Ks, g), False, COLS_FIRST, PARTS, NUMERICS,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip


def grouped_fwd_launch(
    xs: Sequence[Tensor], weights: Sequence[Tensor], ys: Sequence[Tensor],
    *, downs: Sequence[Tensor | None], ups: Sequence[Tensor | None], biases: Sequence[Tensor | None],
    hs: Sequence[Tensor | None], leave_h: Sequence[bool], scales: Sequence[float], inside: bool, arch: str,
) -> Launch:  # fmt: skip
    """y_i (M,N) = x_i·W_iᵀ + h_i·up_iᵀ + bias_i; `inside`: h_i (M,R) = s_i·x_i·down_iᵀ too, stored where `leave_h`."""
    ranks = [0 if up is None else up.shape[1] for up in ups]
    row_major = _row_major(weights)
    config, m = _fwd_config(xs, weights, max(ranks), arch), configs.m_class(max(map(rows, xs)))
    config, pointers = for_operands(config, xs, weights, ys, row_major, m, arch)
    config = fitted("grouped_fwd", config, Beside(arch, xs[0].dtype, inside=inside, pointers=pointers))
    args = {
        **_operands(xs, weights, ys, row_major, config, ("x", "w", "y")),
        "lows": members.lows(ups, hs, leave_h, ranks, scales),
        "downs": members.addresses(downs) if inside else None,
        "biases": members.biases(biases),
        **members.row_counts(ys), "Ns": tuple(y.shape[1] for y in ys), "Ks": tuple(w.shape[1] for w in weights),
        "tiles": tiles_of(ys, config),
        **tile_arguments(config, row_major, numerics(xs[0].dtype, *downs, *ups), "BLOCK_N", "BLOCK_K"),
        "BLOCK_R": configs.block_r(max(ranks)) if inside else RANK_BLOCK,
    }  # fmt: skip
    return product_launch(_grouped_fwd_kernel, ys, args, config, arch)


def makes_h_inside(
    xs: Sequence[Tensor], weights: Sequence[Tensor], factors: Sequence[Tensor | None], rank: int, dropout_p: float,
    arch: str,
) -> bool:  # fmt: skip
    """Whether `grouped_fwd_launch` computes h as well, which saves a launch and a read of x.

    Every column tile computes h again, which is rank/cols of the product's own work: accepted up to an eighth, or with
    few rows, where the product waits for W and not for the matrix unit, up to a quarter. Never with dropout, since each
    tile would draw the mask again; nor with fp32 factors and a 16-bit x, whose halves would spill registers.
    """
    if halves(numerics(xs[0].dtype, *factors)):
        return False
    config = _fwd_config(xs, weights, rank, arch)
    cols = 128 if arch == "cpu" else config["cols"]  # the interpreter's small tiles say nothing about a card
    share = 4 if max(map(rows, xs)) <= configs.M_CLASSES[0] else 8
    return dropout_p == 0.0 and rank > 0 and share * configs.block_r(rank) <= cols


def _fwd_config(xs: Sequence[Tensor], weights: Sequence[Tensor], rank: int, arch: str) -> dict[str, int]:
    return tables.choose("fwd", arch, xs[0].dtype, members.group_shape(xs, weights, rank), weights[0].dtype)


class Paths(NamedTuple):
    """The paths of a backward: for each S (M,R), down (R,K) and the dropout seed."""

    ss: Sequence[Tensor]
    downs: Sequence[Tensor]
    seeds: Sequence[Tensor | int]


@triton.jit
def _dx_rest(
    acc, dx, paths, first_path, last_path, masks, i, j, M, K,
    TMA: tl.constexpr, PARTS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store tile (i, j) of dx = acc + Σ_t mask_t∘(S_t·down_t)/(1-p) over the paths from `first_path` to `last_path`."""
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = tile.column_parts(acc, BLOCK_M, BLOCK_K, PARTS)
    for q in tl.static_range(PARTS):
        part = parts[q]
        k0 = j * BLOCK_K + q * (BLOCK_K // PARTS)
        k = k0 + tl.arange(0, BLOCK_K // PARTS)
        if paths is not None:
            for t in range(first_path, last_path):
                path = members.pick_path(paths, t)
                term = tile.thin_product(
                    Matrix(path.s, path.rank, 1), Matrix(path.down, 1, K), m, k, M, K, path.rank, path.rank, 1,
                    NUMERICS, BLOCK_M, BLOCK_K // PARTS, 16,
                )  # fmt: skip
                if masks is not None:
                    seed = tile.seed_of(members.pick(masks.seeds, t))
                    threshold = tl.cast(masks.threshold, tl.int32)
                    term = tile.dropped(term, seed, m, k0, threshold, masks.inv_keep, BLOCK_M, BLOCK_K // PARTS)
                part += term
        tile.put(dx if TMA else Matrix(dx, K, 1), part, i * BLOCK_M, k0, m, k, M, K, TMA, NUMERICS)


@triton.jit(do_not_specialize=["M", "tiles"])
def _grouped_dx_kernel(
    dy0, dy1, dy2, dy3, w0, w1, w2, w3, dx0, dx1, dx2, dx3, dys, ws, dxs, paths, masks, M, Ms, Ns, Ks, tiles,
    FIRST_MEMBERS: tl.constexpr, FIRST_PATHS: tl.constexpr, COLS_FIRST: tl.constexpr, PARTS: tl.constexpr,
    NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx_o (M,K) = Σ_i dy_i·W_i over the members that read x_o, + Σ_t mask_t∘(S_t·down_t)/(1-p) over its paths.

    Members and paths are sorted by their x: the members of dx_o are FIRST_MEMBERS[o] to FIRST_MEMBERS[o+1], its paths
    likewise. Ms and Ks are the sizes of the dx_o.
    """
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if dys is None:
            first = t * 0
            dy_list = (dy0, dy1, dy2, dy3)
            w_list = (w0, w1, w2, w3)
            dx_list = (dx0, dx1, dx2, dx3)
            for o in tl.static_range(len(Ks)):
                rows = members.rows_of(M, Ms, o)
                count = members.tiles(rows, Ks[o], BLOCK_M, BLOCK_K)
                if (t >= first) & (t < first + count):
                    i, j = tile.place_of(t - first, tl.cdiv(rows, BLOCK_M), tl.cdiv(Ks[o], BLOCK_K), _GROUP)
                    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    for g in tl.static_range(len(Ns)):
                        if g >= FIRST_MEMBERS[o] and g < FIRST_MEMBERS[o + 1]:
                            acc = tile.product(
                                acc, dy_list[g], w_list[g], None, i * BLOCK_M, j * BLOCK_K, rows, Ks[o], Ns[g],
                                True, COLS_FIRST, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_N,
                            )  # fmt: skip
                    _dx_rest(
                        acc, dx_list[o], paths, FIRST_PATHS[o], FIRST_PATHS[o + 1], masks, i, j, rows, Ks[o],
                        True, PARTS, NUMERICS, BLOCK_M, BLOCK_K,
                    )  # fmt: skip
                first += count
        else:
            o, start = members.member_of(t, M, Ms, Ks, BLOCK_M, BLOCK_K)
            rows = members.rows_of(M, Ms, o)
            K = members.pick(Ks, o)
            i, j = tile.place_of(t - start, tl.cdiv(rows, BLOCK_M), tl.cdiv(K, BLOCK_K), _GROUP)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for g in range(members.pick(FIRST_MEMBERS, o), members.pick(FIRST_MEMBERS, o + 1)):
                acc = tile.product(
                    acc, members.pick_rows(dys, g), members.pick_weight(ws, g, COLS_FIRST), None,
                    i * BLOCK_M, j * BLOCK_K, rows, K, members.pick(Ns, g), False, COLS_FIRST, NUMERICS,
                    BLOCK_M, BLOCK_K, BLOCK_N,
                )  # fmt: skip
            _dx_rest(
                acc, members.pick(dxs, o), paths, members.pick(FIRST_PATHS, o), members.pick(FIRST_PATHS, o + 1), masks,
                i, j, rows, K, False, PARTS, NUMERICS, BLOCK_M, BLOCK_K,
            )  # fmt: skip


def grouped_dx_launch(
    dys: Sequence[Tensor], weights: Sequence[Tensor], dxs: Sequence[Tensor],
    *, owners: Sequence[int], paths: Paths, path_owners: Sequence[int], dropout_p: float = 0.0, arch: str,
) -> Launch:  # fmt: skip
    """dx_o (M,K) = Σ dy_i·W_i over the members with owners[i] = o, + Σ mask∘(S_t·down_t)/(1-p) over o's paths.

    `owners` and `path_owners` are in ascending order, and every o has a member.
    """
    ranks = [down.shape[0] for down in paths.downs]
    k_max = max(w.shape[1] for w in weights)
    shape = Shape(configs.m_class(max(map(rows, dxs))), weights[0].shape[0], k_max, max(ranks, default=0))
    config = tables.choose("dx", arch, dys[0].dtype, shape, weights[0].dtype)
    row_major = _row_major(weights)
    how = numerics(dys[0].dtype, *paths.downs)
    rights = [w.t() for w in weights]
    config, pointers = for_operands(config, dys, rights, dxs, not row_major, shape.m, arch)
    beside = Beside(arch, dys[0].dtype, halves=halves(how), drops=dropout_p > 0.0, pointers=pointers)
    config = fitted("grouped_dx", config, beside)
    args = {
        **_operands(dys, rights, dxs, not row_major, config, ("dy", "w", "dx")),
        "paths": tuple(map(Path, paths.ss, paths.downs, ranks)) if ranks else None,
        "masks": members.masks(dropout_p, paths.seeds),
        **members.row_counts(dxs), "Ns": tuple(w.shape[0] for w in weights), "Ks": tuple(dx.shape[1] for dx in dxs),
        "tiles": tiles_of(dxs, config),
        "FIRST_MEMBERS": _firsts(owners, len(dxs)), "FIRST_PATHS": _firsts(path_owners, len(dxs)),
        **tile_arguments(config, not row_major, how, "BLOCK_K", "BLOCK_N"),
    }  # fmt: skip
    return product_launch(_grouped_dx_kernel, dxs, args, config, arch)


def _firsts(owners: Sequence[int], count: int) -> tuple[int, ...]:
    """For each owner, the index of its first entry in a list sorted by owner; then the length of the list."""
    return tuple(sum(owner < o for owner in owners) for o in range(count + 1))


def _operands(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor], cols_first: bool,
    config: dict[str, int], names: tuple[str, str, str],
) -> dict[str, Any]:  # fmt: skip
    """The operands of a kernel by name: descriptors one by one (x0 …), or matrices as one tuple (xs)."""
    args: dict[str, Any] = {f"{name}{i}": None for name in names for i in range(MAX_DESCRIBED)}
    args |= dict.fromkeys(f"{name}s" for name in names)
    found = (
        tuple(left_operand(left, config) for left in lefts),
        tuple(right_operand(right, config, cols_first) for right in rights),
        tuple(out_operand(out, config) if config["tma"] else out for out in outs),  # contiguous, as the caller made it
    )
    for name, each in zip(names, found, strict=True):
        args |= {f"{name}{i}": one for i, one in enumerate(each)} if config["tma"] else {f"{name}s": each}
    return args


def _row_major(weights: Sequence[Tensor]) -> bool:
    return all(weight.stride(1) == 1 for weight in weights)  # of one column, a transposed one is both
