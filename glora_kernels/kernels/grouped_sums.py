"""Several layers in one launch: the thin products before and after the large ones of a group of LoRA layers.

The grid's last axis goes over the members, or over the paths (the distinct low-rank inputs) of the group; a program
selects its own entries of the tuples of operands.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import _dot, _dropped, _load, _pick, _seed, _store
from glora_kernels.kernels.sums import _dy_kernel, _x_kernel


@triton.jit(do_not_specialize=["threshold"])
def _grouped_down_kernel(
    xs,
    stride_xs,
    downs,
    hs,
    seeds,
    Ms,
    Ks,
    Rs,
    scales,
    threshold,
    inv_keep,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h_t (M,R) = s_t·drop_t(x_t)·down_tᵀ of every path t, each with its own mask."""
    # Neighbouring programs take the paths of one block of rows: they read it from the L2.
    t = tl.program_id(0) % len(Ms)
    m = tl.program_id(0) // len(Ms) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    M = _pick(Ms, t)
    K = _pick(Ks, t)
    R = _pick(Rs, t)
    x_ptr = _pick(xs, t)
    stride_x = _pick(stride_xs, t)
    down_ptr = _pick(downs, t)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, m, k, stride_x, 1, M, K)
        if HAS_DROPOUT:
            x = _dropped(x, _seed(_pick(seeds, t), SEED_IS_POINTER), m, k0, threshold, 1.0, BLOCK_M, BLOCK_K)
        down = _load(down_ptr, k, r, 1, K, K, R).to(FACTOR_DTYPE)
        acc = _dot(x, down, acc, FACTOR_PRECISION, UPCAST)
    _store(_pick(hs, t), acc * (_pick(scales, t) * inv_keep), m, r, R, 1, M, R)


@triton.jit(do_not_specialize=["band_width"])
def _grouped_dy_kernel(
    dys,
    stride_dys,
    ups,
    hs,
    ss,
    stride_sbs,
    stride_sms,
    parts,
    stride_part,
    stride_pc,
    Ms,
    Ns,
    Rs,
    scales,
    band_width,
    HAS_S: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_G: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`sums._dy_kernel` for every member, one on each step of the grid's third axis: S_i, dy_iᵀh_i and Σ dy_i.

    A program beyond the rows of its member stores zeros as its partial sums, where a longer member has some.
    """
    g = tl.program_id(2)
    R = _pick(Rs, g)
    _dy_kernel(
        _pick(dys, g), _pick(stride_dys, g), 1, None, 0, 0, None, 0, 0, _pick(ups, g) if HAS_S else None, R, 1,
        None, 0, None, 0, None, None, 0, None, 0, _pick(hs, g) if HAS_FACTOR else None, R, 1, None,
        _pick(ss, g) if HAS_S else None, _pick(stride_sbs, g), _pick(stride_sms, g), 1, None, 0,
        _pick(parts, g) if HAS_FACTOR or HAS_G else None, stride_part, stride_pc,
        _pick(Ms, g), _pick(Ns, g), 0, R, band_width, _pick(scales, g),
        HAS_S, False, HAS_S, False, False, False, False, False, False, HAS_FACTOR, HAS_G, False, False,
        FACTOR_DTYPE, FACTOR_PRECISION, UPCAST,
        BLOCK_M, BLOCK_N, 16, BLOCK_R, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "rows_per_split"])
def _grouped_x_kernel(
    xs,
    stride_xs,
    ss,
    stride_sbs,
    stride_sms,
    seeds,
    parts,
    stride_parts,
    stride_pcs,
    Ms,
    Ks,
    Rs,
    rows_per_split,
    threshold,
    inv_keep,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    BANDS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`sums._x_kernel` for every path, one on each step of the grid's third axis: S_tᵀ·x̃_t (R,K)."""
    t = tl.program_id(2)
    K = _pick(Ks, t)
    if tl.program_id(0) * BLOCK_K < K:
        _x_kernel(
            _pick(xs, t), _pick(stride_xs, t), 1, _pick(ss, t), _pick(stride_sbs, t), _pick(stride_sms, t), 1, None, 0,
            None, 0, 0, None, 0, 0, None, 0, 0, _pick(parts, t), _pick(stride_parts, t), _pick(stride_pcs, t),
            _pick(seeds, t),
            _pick(Ms, t), K, 0, _pick(Rs, t), rows_per_split, threshold, inv_keep,
            False, True, HAS_DROPOUT, SEED_IS_POINTER, False, False, False, False, BANDS,
            FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K, 16, BLOCK_R,
        )  # fmt: skip
