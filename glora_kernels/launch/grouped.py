"""The launchers of a group of LoRA layers. They allocate nothing. A list has one entry a member, or a path.

A path is a low-rank input h = s·x̃·downᵀ that one or more members use. An absent operand is None in its list; where
any member has it, the others get an address that is never read, with size 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.grouped import _grouped_dx_kernel, _grouped_fwd_kernel
from glora_kernels.kernels.grouped_sums import (
    _grouped_bands_kernel,
    _grouped_down_kernel,
    _grouped_dy_kernel,
    _grouped_x_kernel,
)
from glora_kernels.kernels.operands import Bias, Low, Masks, Path
from glora_kernels.launch import configs, environment, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.glora import in_parts, product_launch
from glora_kernels.launch.plan import Dropout, Launch, descriptor, factor_depth, halves, matrix, numerics, options
from glora_kernels.launch.sizes import rows
from glora_kernels.launch.sums import dy_config
from glora_kernels.reference.random import dropout_threshold

MAX_DESCRIBED = 4
"""Up to so many members come as tensor descriptors, each with its own copy of the loop in the kernel."""


def group_shape(xs: Sequence[Tensor], weights: Sequence[Tensor], rank: int) -> Shape:
    """The sizes a configuration is chosen by: the class of the most rows, all columns together, the longest depth."""
    m = configs.m_class(max(map(rows, xs)))
    return Shape(m, sum(w.shape[0] for w in weights), max(w.shape[1] for w in weights), rank)


def makes_h_inside(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    rank: int,
    dropout_p: float,
    arch: str,
) -> bool:
    """Whether `grouped_fwd_launch` makes h beside the product, which saves a launch and a read of x.

    Every column tile makes it again: rank/cols of the product's own work, taken where it is at most an eighth, or of a
    few rows, whose product waits for W and not for the matrix unit, a quarter. A mask
    would have to be drawn again with it, so never with dropout; nor with fp32 factors beside 16 bits, whose halves
    have no place in the registers of the product's loop.
    """
    if halves(numerics(xs[0].dtype, *factors)):
        return False
    config = _fwd_config(xs, weights, rank, arch)
    cols = 128 if arch == "cpu" else config["cols"]  # the interpreter's small tiles say nothing about a card
    share = 4 if max(map(rows, xs)) <= configs.M_CLASSES[0] else 8
    return dropout_p == 0.0 and rank > 0 and share * configs.block_r(rank) <= cols


def grouped_fwd_launch(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    *,
    downs: Sequence[Tensor | None],
    ups: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    leave_h: Sequence[bool],
    scales: Sequence[float],
    inside: bool,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """y_i (M,N) = x_i·W_iᵀ + h_i·up_iᵀ + bias_i; `inside`: h_i (M,R) = s_i·x_i·down_iᵀ is made, and left `leave_h`."""
    ranks = [0 if up is None else up.shape[1] for up in ups]
    config = config or _fwd_config(xs, weights, max(ranks), arch)
    row_major = _row_major(weights)
    shape = group_shape(xs, weights, 0)
    operands, config = _operands(
        xs, weights, ys, _beside(config) if inside else config, arch, (shape.m, shape.n), ("x", "w", "y"), row_major
    )  # fmt: skip
    if inside:  # also where it became another one, for pointers
        config = _beside(config)
    tall, cols = config["rows"], config["cols"]
    tiles = sum(cdiv(rows(y), tall) * cdiv(y.shape[1], cols) for y in ys)
    args = {
        **operands,
        "lows": _lows(ups, hs, leave_h, ranks, scales),
        "downs": _addresses(downs) if inside else None,
        "biases": _biases(biases),
        **_rows(ys), "Ns": tuple(y.shape[1] for y in ys), "Ks": tuple(w.shape[1] for w in weights), "tiles": tiles,
        "COLS_FIRST": row_major, "PARTS": config["parts"], "NUMERICS": numerics(xs[0].dtype, *downs, *ups),
        "BLOCK_M": tall, "BLOCK_N": cols, "BLOCK_K": config["depth"],
        "BLOCK_R": configs.block_r(max(ranks)) if inside else 16,
    }  # fmt: skip
    return product_launch(_grouped_fwd_kernel, tiles, args, ys[0], config, arch)


def grouped_down_launch(
    xs: Sequence[Tensor],
    downs: Sequence[Tensor],
    hs: Sequence[Tensor],
    *,
    scales: Sequence[float],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | int] = (),
    arch: str,
) -> Launch:
    """h_t (M,R) = s_t·drop_t(x_t)·down_tᵀ of every path."""
    rank, k_max = max(down.shape[0] for down in downs), max(x.shape[1] for x in xs)
    sizes = _rows(xs)
    how = numerics(xs[0].dtype, *downs)
    shape = Shape(configs.m_class(sizes["M"]), k_max, k_max, rank)
    config = tables.choose("prepare", arch, xs[0].dtype, shape)
    config = configs.fitted("down", config, arch, xs[0].dtype, rank, halves=halves(how))
    args = {
        "xs": tuple(map(matrix, xs)), "downs": tuple(downs), "hs": tuple(hs),
        **sizes, "Ks": tuple(x.shape[1] for x in xs), "Rs": tuple(down.shape[0] for down in downs),
        "scales": tuple(map(float, scales)), "masks": _masks(dropout_p, seeds),
        "NUMERICS": how,
        "BLOCK_M": config["rows"], "BLOCK_K": factor_depth(config, how), "BLOCK_R": configs.block_r(rank),
    }  # fmt: skip
    grid = (cdiv(sizes["M"], config["rows"]) * len(xs),)
    return Launch(_grouped_down_kernel, grid, args, options(config, args))


class Paths(NamedTuple):
    """The paths of a backward: S (M,R), down (R,K) and the key of the mask of each."""

    ss: Sequence[Tensor]
    downs: Sequence[Tensor]
    seeds: Sequence[Tensor | int]


def grouped_dx_launch(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dxs: Sequence[Tensor],
    *,
    owners: Sequence[int],
    paths: Paths,
    path_owners: Sequence[int],
    dropout_p: float = 0.0,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """dx_o (M,K) = Σ dy_i·W_i over the members with owners[i] = o, + Σ mask∘(S_t·down_t)/(1-p) over o's paths.

    `owners` and `path_owners` are in ascending order, and every o has a member.
    """
    ranks = [down.shape[0] for down in paths.downs]
    k_max = max(w.shape[1] for w in weights)
    shape = Shape(configs.m_class(max(map(rows, dxs))), weights[0].shape[0], k_max, max(ranks, default=0))
    config = config or tables.choose("dx", arch, dys[0].dtype, shape, weights[0].dtype)
    row_major = _row_major(weights)
    how = numerics(dys[0].dtype, *paths.downs)
    config = configs.fitted(
        "dx", in_parts(config, arch, how), arch, dys[0].dtype, shape.r, halves=halves(how), drops=dropout_p > 0.0
    )  # fmt: skip
    across = sum(dx.shape[1] for dx in dxs)
    operands, config = _operands(
        dys, [w.t() for w in weights], dxs, config, arch, (shape.m, across), ("dy", "w", "dx"), not row_major
    )  # fmt: skip
    tiles = sum(cdiv(rows(dx), config["rows"]) * cdiv(dx.shape[1], config["cols"]) for dx in dxs)
    args = {
        **operands,
        "paths": tuple(map(Path, paths.ss, paths.downs, ranks)) if ranks else None,
        "masks": _masks(dropout_p, paths.seeds),
        **_rows(dxs), "Ns": tuple(w.shape[0] for w in weights), "Ks": tuple(dx.shape[1] for dx in dxs), "tiles": tiles,
        "FIRST_MEMBERS": _firsts(owners, len(dxs)), "FIRST_PATHS": _firsts(path_owners, len(dxs)),
        "COLS_FIRST": not row_major, "PARTS": config["parts"], "NUMERICS": how,
        "BLOCK_M": config["rows"], "BLOCK_N": config["depth"], "BLOCK_K": config["cols"],
    }  # fmt: skip
    return product_launch(_grouped_dx_kernel, tiles, args, dxs[0], config, arch)


def most_bands(rank: int) -> int:
    """How many bands of S a kernel of a group reads: `_grouped_x_kernel` has shared memory for so many, in fp32."""
    return max(1, min(configs.MAX_BANDS, 192 // configs.block_r(max(1, rank), configs.RANK_BLOCK)))


def grouped_dy_sizes(
    shape: Shape, members: int, sharing: int, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> tuple[int, int, int]:
    """(splits of M, bands of N, width of a band): the leading sizes of what `grouped_dy_launch` fills.

    The members' programs run beside each other, so that each needs fewer bands than alone. Where up to `sharing`
    members add to one S, their bands together are no more than `most_bands`, as long as that can be.
    """
    shape = shape._replace(m=configs.m_class(m := shape.m))
    config = _dy_config(shape, dtype, arch, factors)
    most = max(1, most_bands(shape.r) // max(1, sharing))
    step = cdiv(cdiv(shape.n, most), config["cols"]) * config["cols"]
    number, width = configs.bands(arch, members * shape.m, config["rows"], shape.n, max(step, config["cols"]))
    return cdiv(m, config["rows"]), number, width


def grouped_dy_launch(
    dys: Sequence[Tensor],
    *,
    ups: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    ss: Sequence[Tensor | None],
    first_bands: Sequence[int],
    parts: Sequence[Tensor] | None,
    with_g: bool,
    scales: Sequence[float],
    factors: torch.dtype | None = None,
    shape: Shape,
    bands: tuple[int, int],
    arch: str,
) -> Launch:
    """S_i (·,M,R) = s_i·dy_i·up_i from its first band on, and part_i (splits,·,N): Σ dy_i (`with_g`), then dy_iᵀh_i.

    The latter where `hs` are there. The parts are columns of one tensor, and `shape` is the largest of the members.
    """
    sizes = _rows(dys)
    config = _dy_config(shape._replace(m=configs.m_class(sizes["M"])), dys[0].dtype, arch, factors)
    ranks = tuple(0 if up is None else up.shape[1] for up in ups)
    part_split, part_row = (0, 0) if parts is None else parts[0].stride()[:2]
    args = {
        "dys": tuple(map(matrix, dys)), "ups": _addresses(ups), "hs": _addresses(hs), "ss": _addresses(ss),
        "first_bands": tuple(first_bands),
        "parts": None if parts is None else tuple(parts), "part_split": part_split, "part_row": part_row,
        **sizes, "Ns": tuple(dy.shape[1] for dy in dys), "Rs": ranks,
        "scales": tuple(map(float, scales)), "band_width": bands[1],
        "WITH_G": with_g, **_rank_blocks(max(ranks)), "NUMERICS": numerics(dys[0].dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"],
    }  # fmt: skip
    grid = (cdiv(sizes["M"], config["rows"]) * args["RANK_BLOCKS"], bands[0], len(dys))
    return Launch(_grouped_dy_kernel, grid, args, options(config, args))


def grouped_x_launch(
    xs: Sequence[Tensor],
    *,
    ss: Sequence[Tensor],
    sums: Sequence[Tensor] | None = None,
    parts: Sequence[Tensor],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | int] = (),
    factors: torch.dtype | None = None,
    shape: Shape,
    splits: int,
    arch: str,
) -> Launch:
    """part_t (splits,R,K) = S_tᵀ·drop_t(x_t) over the rows of each split, S (bands,M,R); `shape` is the largest.

    Σ_bands S_t goes to `sums` (M,R), where they are given. S is multiplied in the dtype of x, or of the `factors` where
    that is wider.
    """
    sizes = _rows(xs)
    config = tables.choose("x", arch, xs[0].dtype, shape._replace(m=configs.m_class(sizes["M"])))
    aligned = all(x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in xs)
    config = configs.fitted("x", config, arch, xs[0].dtype, shape.r, drops=dropout_p > 0.0, aligned=aligned)
    ranks = tuple(s.shape[2] for s in ss)
    columns = tuple(x.shape[1] for x in xs)
    rows_of = tuple(part.stride(1) for part in parts)
    args = {
        "xs": tuple(map(matrix, xs)), "ss": tuple(ss), "sums": None if sums is None else tuple(sums),
        "parts": tuple(parts), "part_split": parts[0].stride(0), "part_row": None if rows_of == columns else rows_of[0],
        **sizes, "Ks": columns, "Rs": ranks, "masks": _masks(dropout_p, seeds),
        "rows_per_split": cdiv(cdiv(sizes["M"], splits), config["rows"]) * config["rows"],
        "BANDS": ss[0].shape[0], **_rank_blocks(max(ranks)), "NUMERICS": numerics(xs[0].dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"],
    }  # fmt: skip
    grid = (cdiv(shape.k, config["cols"]) * args["RANK_BLOCKS"], splits, len(xs))
    return Launch(_grouped_x_kernel, grid, args, options(config, args))


def grouped_bands_launch(ss: Sequence[Tensor], sums: Sequence[Tensor]) -> Launch:
    """sums_t (M,R) = Σ_bands S_t, S (bands,M,R)."""
    sizes = _rows(sums)
    block = 32 if environment.interpreting() else 1024
    args = {
        "ss": tuple(ss), "sums": tuple(sums), **sizes, "Rs": tuple(s.shape[2] for s in ss), "bands": ss[0].shape[0],
        "BLOCK": block,
    }  # fmt: skip
    grid = (cdiv(sizes["M"] * max(s.shape[2] for s in ss), block), len(ss))
    return Launch(_grouped_bands_kernel, grid, args, {"num_warps": 4, "num_stages": 1})


def _beside(config: dict[str, int]) -> dict[str, int]:
    """A product's configuration with h beside it: its tile is finished in one part, or ptxas serializes the wgmma.

    The store of a whole 256 columns then takes the shared memory of a stage.
    """
    stages = 3 if config["tma"] and config["cols"] == 256 else config["num_stages"]
    return config | {"parts": 1, "num_stages": min(stages, config["num_stages"])}


def _rank_blocks(rank: int) -> dict[str, int]:
    """The columns of S that one program makes, or multiplies x by, and how many programs share them."""
    block = configs.block_r(max(1, rank), configs.RANK_BLOCK)
    return {"RANK_BLOCKS": max(1, cdiv(rank, block)), "BLOCK_R": block}


def _fwd_config(xs: Sequence[Tensor], weights: Sequence[Tensor], rank: int, arch: str) -> dict[str, int]:
    return tables.choose("fwd", arch, xs[0].dtype, group_shape(xs, weights, rank), weights[0].dtype)


def _dy_config(shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None) -> dict[str, int]:
    return configs.fitted("dy", dy_config(shape, dtype, arch, factors=factors), arch, dtype, shape.r)


def _operands(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    outs: Sequence[Tensor],
    config: dict[str, int],
    arch: str,
    size: tuple[int, int],
    names: tuple[str, str, str],
    row_major: bool,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The matrices of left·rightᵀ, right (cols, depth), by name, and the configuration that suits them.

    All of them as descriptors, the first x0 …, where the configuration wants TMA, it can read them and they are few;
    else as tuples of matrices, xs ….
    """
    described: dict[str, Any] = {f"{name}{i}": None for name in names for i in range(MAX_DESCRIBED)}
    mixed = rights[0].dtype != lefts[0].dtype
    if config["tma"] and not mixed and len(lefts) <= MAX_DESCRIBED:
        tall, cols, depth = config["rows"], config["cols"], config["depth"]
        for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
            described[f"{names[0]}{i}"] = descriptor(left, tall, depth)
            described[f"{names[1]}{i}"] = (
                descriptor(right, cols, depth) if row_major else descriptor(right.t(), depth, cols)
            )
        for i, out in enumerate(outs):
            described[f"{names[2]}{i}"] = descriptor(out, tall, cols // config["parts"])
        if sum(found is not None for found in described.values()) == 2 * len(lefts) + len(outs):
            return described | dict.fromkeys(f"{name}s" for name in names), config
    if config["tma"]:
        config = configs.large_product(arch, lefts[0].dtype, *size, mixed=mixed, tma=False)
    pointers = (tuple(map(matrix, lefts)), tuple(map(matrix, rights)), tuple(outs))
    return dict.fromkeys(described) | {f"{name}s": each for name, each in zip(names, pointers, strict=True)}, config


def _rows(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """M, the most rows of a member, and Ms: those of each, where they differ."""
    each = tuple(map(rows, tensors))
    return {"M": max(each), "Ms": each if len(set(each)) > 1 else None}


def _lows(
    ups: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    leave_h: Sequence[bool],
    ranks: Sequence[int],
    scales: Sequence[float],
) -> tuple[Low, ...] | None:
    up, h = _addresses(ups), _addresses(hs)
    if up is None or h is None:
        return None
    return tuple(map(Low, up, h, map(int, leave_h), ranks, map(float, scales)))


def _biases(biases: Sequence[Tensor | None]) -> tuple[Bias, ...] | None:
    addresses = _addresses(biases)
    if addresses is None:
        return None
    return tuple(map(Bias, addresses, (0 if bias is None else bias.shape[0] for bias in biases)))


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """A tensor for every member, of whichever has one where it has none itself; None where no member has."""
    stand_in = next((tensor for tensor in tensors if tensor is not None), None)
    if stand_in is None:
        return None
    return tuple(stand_in if tensor is None else tensor for tensor in tensors)


def _row_major(weights: Sequence[Tensor]) -> bool:
    return all(weight.stride(1) == 1 for weight in weights)  # of one column, a transposed one is both


def _firsts(owners: Sequence[int], count: int) -> tuple[int, ...]:
    """Where the entries of each owner begin in a list in their order, and where the last one's end."""
    return tuple(sum(owner < o for owner in owners) for o in range(count + 1))


def _masks(p: float, seeds: Sequence[Tensor | int]) -> Masks | None:
    """The masks of a kernel that drops, with one key a path; None where it does not."""
    each = [Dropout(p, seed).key() for seed in seeds] if p > 0.0 else []
    return Masks(tuple(each), float(dropout_threshold(p)), 1.0 / (1.0 - p)) if each else None
