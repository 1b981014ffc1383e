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
from glora_kernels.kernels.grouped_sums import _grouped_down_kernel, _grouped_dy_kernel, _grouped_x_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.glora import GROUP, RANK_STEP, in_parts, product_grid
from glora_kernels.launch.plan import Launch, arithmetic, descriptor, dropout, factor_arithmetic, factor_depth, options
from glora_kernels.launch.sums import dy_config

MAX_DESCRIBED = 4
"""Up to so many members come as tensor descriptors, each with its own copy of the loop in the kernel."""


def group_shape(xs: Sequence[Tensor], weights: Sequence[Tensor], rank: int) -> Shape:
    """The sizes a configuration is chosen by: the most rows, all columns together, the longest reduction."""
    return Shape(
        max(x.shape[0] for x in xs), sum(w.shape[0] for w in weights), max(w.shape[1] for w in weights), rank
    )  # fmt: skip


def makes_h_inside(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    rank: int,
    dropout_p: float,
    arch: str,
) -> bool:
    """Whether `grouped_fwd_launch` makes h beside the product, which saves a launch and a read of x.

    Every column tile makes it again: rank/cols of the product's own work, taken where it is at most an eighth. A mask
    would have to be drawn again with it, so never with dropout; nor with fp32 factors beside 16 bits, whose halves
    have no place in the registers of the product's loop.
    """
    if factor_arithmetic(xs[0].dtype, *factors)["FACTOR_PRECISION"] == "halves":
        return False
    config = _fwd_config(xs, weights, rank, arch)
    cols = 128 if arch == "cpu" else config["cols"]  # the interpreter's small tiles say nothing about a card
    return dropout_p == 0.0 and rank > 0 and 8 * configs.block_r(rank) <= cols


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
    described, config = _described(
        xs, weights, ys, _beside(config) if inside else config, arch, _sizes(xs, weights), ("x", "w", "y"), row_major
    )  # fmt: skip
    if inside:  # also where it became another one, for pointers
        config = _beside(config)
    rows, cols, depth = config["rows"], config["cols"], config["depth"]
    tiles = sum(cdiv(y.shape[0], rows) * cdiv(y.shape[1], cols) for y in ys)
    args = {
        **described,
        "xs": tuple(xs), "stride_xs": tuple(x.stride(0) for x in xs),
        "ws": tuple(weights), "stride_ws": _weight_strides(weights, row_major),
        "ys": tuple(ys),
        "downs": _addresses(downs), "ups": _addresses(ups),
        "biases": _addresses(biases), "bias_sizes": tuple(0 if b is None else b.shape[0] for b in biases),
        "hs": _addresses(hs), "leave_h": tuple(int(leave) for leave in leave_h),
        "Ms": tuple(y.shape[0] for y in ys), "Ns": tuple(y.shape[1] for y in ys),
        "Ks": tuple(w.shape[1] for w in weights), "Rs": tuple(ranks), "scales": tuple(map(float, scales)),
        "tiles": tiles,
        "HAS_DOWN": max(ranks) > 0, "DOWN_INSIDE": inside, "HAS_BIAS": any(b is not None for b in biases),
        "TMA": bool(config["tma"]), "W_IS_ROW_MAJOR": row_major, "PARTS": config["parts"],
        **arithmetic(xs[0].dtype), **factor_arithmetic(xs[0].dtype, *downs, *ups),
        "BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth,
        "BLOCK_R": configs.block_r(max(1, *ranks)) if inside else RANK_STEP, "GROUP": GROUP,
    }  # fmt: skip
    return Launch(_grouped_fwd_kernel, product_grid(tiles, ys[0], config, arch), args, options(config, args))


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
    rank = max(down.shape[0] for down in downs)
    rows_max, k_max = max(x.shape[0] for x in xs), max(x.shape[1] for x in xs)
    config = tables.choose("prepare", arch, xs[0].dtype, Shape(rows_max, k_max, k_max, rank))
    if rank > 16:  # what is selected a path needs registers beside the mask: these sizes do not spill
        config = config | {"num_warps": 8}
        if xs[0].dtype == torch.float32:
            config |= {"rows": 16, "depth": config["depth"] if arch.startswith("gfx") else 64}
    factors = factor_arithmetic(xs[0].dtype, *downs)
    args = {
        "xs": tuple(xs), "stride_xs": tuple(x.stride(0) for x in xs),
        "downs": tuple(downs), "hs": tuple(hs),
        "Ms": tuple(x.shape[0] for x in xs), "Ks": tuple(x.shape[1] for x in xs),
        "Rs": tuple(down.shape[0] for down in downs), "scales": tuple(map(float, scales)),
        **_dropout(dropout_p, seeds, len(xs)),
        **factors,
        "BLOCK_M": config["rows"], "BLOCK_K": factor_depth(config, factors), "BLOCK_R": configs.block_r(rank),
    }  # fmt: skip
    return Launch(_grouped_down_kernel, (cdiv(rows_max, config["rows"]) * len(xs),), args, options(config, args))


class Paths(NamedTuple):
    """The paths of a backward: S (bands,M,R), down (R,K) and the key of the mask of each."""

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
    shape = Shape(dys[0].shape[0], weights[0].shape[0], max(w.shape[1] for w in weights), max(ranks, default=0))
    config = config or tables.choose("dx", arch, dys[0].dtype, shape, weights[0].dtype)
    row_major = _row_major(weights)
    cols = sum(dx.shape[1] for dx in dxs)
    factors = factor_arithmetic(dys[0].dtype, *paths.downs)
    config = in_parts(config, arch, factors)
    if arch == "sm_100" and dropout_p > 0.0 and factors["FACTOR_PRECISION"] == "halves":
        config = config | {"cols": min(64, config["cols"])}  # what does not spill
    described, config = _described(
        dys, [w.t() for w in weights], dxs, config, arch, (shape.m, cols), ("dy", "w", "dx"),
        not row_major,
    )  # fmt: skip
    tiles = sum(cdiv(dx.shape[0], config["rows"]) * cdiv(dx.shape[1], config["cols"]) for dx in dxs)
    args = {
        **described,
        "dys": tuple(dys), "stride_dys": tuple(dy.stride(0) for dy in dys),
        "ws": tuple(weights), "stride_ws": _weight_strides(weights, row_major),
        "dxs": tuple(dxs), "Ns": tuple(w.shape[0] for w in weights), "first_members": _firsts(owners, len(dxs)),
        "Ms": tuple(dx.shape[0] for dx in dxs), "Ks": tuple(dx.shape[1] for dx in dxs),
        "first_paths": _firsts(path_owners, len(dxs)),
        "ss": tuple(paths.ss), "stride_sbs": tuple(s.stride(0) for s in paths.ss),
        "stride_sms": tuple(s.stride(1) for s in paths.ss),
        "downs": tuple(paths.downs), "Rs": tuple(ranks),
        **_dropout(dropout_p, paths.seeds, len(ranks)),
        "tiles": tiles, "OWNERS": tuple(owners), "HAS_DOWN": bool(ranks),
        "BANDS": paths.ss[0].shape[0] if ranks else 1,
        "TMA": bool(config["tma"]), "W_IS_ROW_MAJOR": row_major, "PARTS": config["parts"],
        **arithmetic(dys[0].dtype), **factors,
        "BLOCK_M": config["rows"], "BLOCK_N": config["depth"], "BLOCK_K": config["cols"],
        "BLOCK_R": RANK_STEP, "GROUP": GROUP,
    }  # fmt: skip
    return Launch(_grouped_dx_kernel, product_grid(tiles, dxs[0], config, arch), args, options(config, args))


def most_bands(rank: int) -> int:
    """How many bands of S a kernel of a group reads: `_grouped_x_kernel` has shared memory for so many, in fp32."""
    return max(1, min(configs.MAX_BANDS, 192 // configs.block_r(max(1, rank))))


def grouped_dy_sizes(
    shape: Shape, members: int, sharing: int, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> tuple[int, int, int]:
    """(splits of M, bands of N, width of a band): the leading sizes of what `grouped_dy_launch` fills.

    The members' programs run beside each other, so that each needs fewer bands than alone. Where up to `sharing`
    members add to one S, their bands together are no more than `most_bands`, as long as that can be.
    """
    config = dy_config(shape, dtype, arch, factors=factors)
    most = max(1, most_bands(shape.r) // max(1, sharing))
    step = cdiv(cdiv(shape.n, most), config["cols"]) * config["cols"]
    number, width = configs.bands(arch, members * shape.m, config["rows"], shape.n, max(step, config["cols"]))
    return cdiv(shape.m, config["rows"]), number, width


def grouped_dy_launch(
    dys: Sequence[Tensor],
    *,
    ups: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    ss: Sequence[Tensor | None],
    parts: Sequence[Tensor] | None,
    with_g: bool,
    scales: Sequence[float],
    factors: torch.dtype | None = None,
    shape: Shape,
    bands: tuple[int, int],
    arch: str,
) -> Launch:
    """S_i (bands,M,R) = s_i·dy_i·up_i, and part_i (splits,·,N): Σ dy_i (`with_g`), then dy_iᵀh_i where `hs` are there.

    The parts are columns of one tensor, and `shape` is the largest of the members.
    """
    config = dy_config(shape, dys[0].dtype, arch, factors=factors)
    ranks = tuple(0 if up is None else up.shape[1] for up in ups)
    first = None if parts is None else parts[0]
    args = {
        "dys": tuple(dys), "stride_dys": tuple(dy.stride(0) for dy in dys),
        "ups": _addresses(ups), "hs": _addresses(hs), "ss": _addresses(ss),
        "stride_sbs": tuple(0 if s is None else s.stride(0) for s in ss),
        "stride_sms": tuple(0 if s is None else s.stride(1) for s in ss),
        "parts": None if parts is None else tuple(parts),
        "stride_part": 0 if first is None else first.stride(0), "stride_pc": 0 if first is None else first.stride(1),
        "Ms": tuple(dy.shape[0] for dy in dys), "Ns": tuple(dy.shape[1] for dy in dys), "Rs": ranks,
        "scales": tuple(map(float, scales)), "band_width": bands[1],
        "HAS_S": any(s is not None for s in ss), "HAS_FACTOR": any(h is not None for h in hs), "HAS_G": with_g,
        **factor_arithmetic(dys[0].dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_R": configs.block_r(max(1, *ranks)),
    }  # fmt: skip
    grid = (cdiv(shape.m, config["rows"]), bands[0], len(dys))
    return Launch(_grouped_dy_kernel, grid, args, options(config, args))


def grouped_x_launch(
    xs: Sequence[Tensor],
    *,
    ss: Sequence[Tensor],
    parts: Sequence[Tensor],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | int] = (),
    factors: torch.dtype | None = None,
    shape: Shape,
    splits: int,
    arch: str,
) -> Launch:
    """part_t (splits,R,K) = S_tᵀ·drop_t(x_t) over the rows of each split; `shape` is the largest of the paths.

    S is multiplied in the dtype of x, or of the `factors` where that is wider.
    """
    config = tables.choose("x", arch, xs[0].dtype, shape)
    if xs[0].dtype == torch.float32 and shape.r > 16:  # with fewer they spill
        config = config | {"num_warps": 8}
    ranks = tuple(s.shape[2] for s in ss)
    args = {
        "xs": tuple(xs), "stride_xs": tuple(x.stride(0) for x in xs),
        "ss": tuple(ss), "stride_sbs": tuple(s.stride(0) for s in ss), "stride_sms": tuple(s.stride(1) for s in ss),
        "parts": tuple(parts), "stride_parts": tuple(part.stride(0) for part in parts),
        "stride_pcs": tuple(part.stride(1) for part in parts),
        "Ms": tuple(x.shape[0] for x in xs), "Ks": tuple(x.shape[1] for x in xs), "Rs": ranks,
        "rows_per_split": cdiv(cdiv(shape.m, splits), config["rows"]) * config["rows"],
        **_dropout(dropout_p, seeds, len(xs)),
        "BANDS": ss[0].shape[0],
        **factor_arithmetic(xs[0].dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(max(ranks)),
    }  # fmt: skip
    return Launch(_grouped_x_kernel, (cdiv(shape.k, config["cols"]), splits, len(xs)), args, options(config, args))


def _beside(config: dict[str, int]) -> dict[str, int]:
    """A product's configuration with h beside it: its tile is finished in one part, or ptxas serializes the wgmma.

    The store of a whole 256 columns then takes the shared memory of a stage.
    """
    stages = 3 if config["tma"] and config["cols"] == 256 else config["num_stages"]
    return config | {"parts": 1, "num_stages": min(stages, config["num_stages"])}


def _fwd_config(xs: Sequence[Tensor], weights: Sequence[Tensor], rank: int, arch: str) -> dict[str, int]:
    return tables.choose("fwd", arch, xs[0].dtype, group_shape(xs, weights, rank), weights[0].dtype)


def _sizes(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[int, int]:
    shape = group_shape(xs, weights, 0)
    return shape.m, shape.n


def _described(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    outs: Sequence[Tensor],
    config: dict[str, int],
    arch: str,
    size: tuple[int, int],
    names: tuple[str, str, str],
    row_major: bool,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The matrices of left·rightᵀ, right (cols, depth), as descriptors by name, and the configuration that suits them.

    All of them where the configuration wants TMA, it can read them and they are few; else none.
    """
    described: dict[str, Any] = {f"{name}{i}": None for name in names for i in range(MAX_DESCRIBED)}
    mixed = rights[0].dtype != lefts[0].dtype
    if config["tma"] and not mixed and len(lefts) <= MAX_DESCRIBED:
        rows, cols, depth = config["rows"], config["cols"], config["depth"]
        for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
            described[f"{names[0]}{i}"] = descriptor(left, rows, depth)
            described[f"{names[1]}{i}"] = (
                descriptor(right, cols, depth) if row_major else descriptor(right.t(), depth, cols)
            )
        for i, out in enumerate(outs):
            described[f"{names[2]}{i}"] = descriptor(out, rows, cols // config["parts"])
        if sum(found is not None for found in described.values()) == 2 * len(lefts) + len(outs):
            return described, config
    if config["tma"]:
        config = configs.large_product(arch, lefts[0].dtype, *size, mixed=mixed, tma=False)
    return dict.fromkeys(described), config


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """A tensor for every member, of whichever has one where it has none itself; None where no member has."""
    stand_in = next((tensor for tensor in tensors if tensor is not None), None)
    if stand_in is None:
        return None
    return tuple(stand_in if tensor is None else tensor for tensor in tensors)


def _row_major(weights: Sequence[Tensor]) -> bool:
    return all(weight.stride(1) == 1 for weight in weights)  # of one column, a transposed one is both


def _weight_strides(weights: Sequence[Tensor], row_major: bool) -> tuple[int, ...]:
    return tuple(weight.stride(0 if row_major else 1) for weight in weights)


def _firsts(owners: Sequence[int], count: int) -> tuple[int, ...]:
    """Where the entries of each owner begin in a list in their order, and where the last one's end."""
    return tuple(sum(owner < o for owner in owners) for o in range(count + 1))


def _dropout(p: float, seeds: Sequence[Tensor | int], count: int) -> dict[str, Any]:
    """The arguments of a kernel that drops, with one key a path."""
    each = [dropout(p, seed) for seed in seeds] if p > 0.0 else [dropout(0.0, None)] * max(1, count)
    shared = {name: value for name, value in each[0].items() if name != "seed"}
    return shared | {"seeds": tuple(one["seed"] for one in each)}
