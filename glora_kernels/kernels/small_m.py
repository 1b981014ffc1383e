"""y for a few tokens over a 4-bit base: the packed weight is read once, all the rest happens in the same launch.

One program owns BLOCK_N rows of W and all M tokens, and walks K. A byte holds neighbours (k, k+1) of a row: instead of
interleaving the decoded nibbles, x is read as pairs and split, Z = x_even·W_highᵀ + x_odd·W_lowᵀ. Nothing of W is
shuffled, and one absmax serves the 16 bytes that a thread reads. The bytes of the next step are requested before
those of this one are decoded. M = 1 adds products in registers; more tokens take the matrix unit.

h = s·x·B_downᵀ is needed by every program. Made inside, every program reads all of B_down from the L2:
N/BLOCK_N·R·K·2 bytes beside the N·K·0.5625 of W (fp32 absmax, blocks of 64). On an H100 (3 TB/s, L2 5.5 TB/s), M = 1,
R = 16, µs for W alone → W and B_down through the L2: gate (14336,4096), BLOCK_N 64: 11.0 → 11.2; down (4096,14336),
32: 11.0 → 16.7; q (4096,4096), 32: 3.1 → 4.8; k (1024,4096), 16: 0.8 → 2.0. A launch of its own costs about 2.5 more:
inside is right for all but down_proj and the large ranks, for which `_small_h_kernel` goes before (`launch.small_m`).
"""

import triton
import triton.language as tl

from glora_kernels.kernels.codec import _absmax, _decode, _nearest
from glora_kernels.kernels.common import (
    _add_terms,
    _dot_thin,
    _dot_wide,
    _load,
    _load_vector,
    _read,
    _transposed,
    _write,
)

_RUN = tl.constexpr(16)
"""Bytes of a row that share an absmax whatever the block size (32 elements): what a thread loads at once."""


@triton.jit
def _pairs(ptr, DTYPE: tl.constexpr):
    """A pointer to DTYPE as one to words that hold two of them."""
    if DTYPE == tl.float32:
        return ptr.to(tl.pointer_type(tl.int64))
    else:
        return ptr.to(tl.pointer_type(tl.int32))


@triton.jit
def _split_pair(word, DTYPE: tl.constexpr):
    """The two numbers of a little-endian word, that at the lower address first."""
    if DTYPE == tl.float32:
        return word.to(tl.int32).to(DTYPE, bitcast=True), (word >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        return word.to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _runs(codes, n, first, N, HALF, BLOCK_H: tl.constexpr):
    """Bytes [first, first + BLOCK_H) of the rows n, and an absmax for every _RUN of them; zeros outside (N, HALF)."""
    row = n.to(tl.int64)[:, None]
    j = first + tl.arange(0, BLOCK_H)
    byte = tl.load(codes.packed + row * HALF + j[None, :], mask=(n[:, None] < N) & (j[None, :] < HALF), other=0)
    run = first + tl.arange(0, BLOCK_H // _RUN) * _RUN
    block = row * (HALF // (codes.block // 2)) + (run // (codes.block // 2))[None, :]
    return byte, _absmax(codes, 0, block, (n[:, None] < N) & (run[None, :] < HALF))


@triton.jit(do_not_specialize=["M"])
def _small_m_kernel(
    x,
    codes,
    y,
    b_down,
    h,
    sigma,
    terms,
    M,
    N,
    K,
    R,
    scale,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[m,n] = (Σₖ x[m,k]·w[n,k])·(1+a[n]) + Σᵣ h[m,r]·B_up[n,r] + σ[m]·b[n] + β[n], w = code[nibble]·absmax in DTYPE.

    With `b_down`, h[m,r] = scale·Σₖ x[m,k]·B_down[r,k], rounded to the factors' dtype, is made here, and stored by the
    first program where there is an `h`; else it is read. So is σ made, and stored to `sigma`. K/2 bytes are a row of W.
    BLOCK_M = 1, or a multiple of 16 with masks.
    """
    DTYPE: tl.constexpr = NUMERICS.dtype
    UPCAST: tl.constexpr = NUMERICS.upcast
    SUMS: tl.constexpr = terms.b is not None or sigma is not None
    BLOCK_H: tl.constexpr = BLOCK_K // 2
    ONE: tl.constexpr = BLOCK_M == 1
    HALF = tl.multiple_of(K // 2, 16)  # as `serves_small_m` makes sure
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_H)
    x_pairs = _pairs(x.ptr, DTYPE)
    # Of one token, the sums over K are kept apart until the end: reducing in the loop would need shuffles.
    z_acc = tl.zeros((BLOCK_N, BLOCK_H) if ONE else (BLOCK_M, BLOCK_N), tl.float32)
    h_acc = tl.zeros((BLOCK_R, BLOCK_K) if ONE else (BLOCK_M, BLOCK_R), tl.float32)
    sigma_acc = tl.zeros((1, BLOCK_K) if ONE else (BLOCK_M,), tl.float32)
    byte, absmax = _runs(codes, n, 0, N, HALF, BLOCK_H)
    for j0 in range(0, HALF, BLOCK_H):
        next_byte, next_absmax = _runs(codes, n, j0 + BLOCK_H, N, HALF, BLOCK_H)
        if ONE:
            word = tl.load(x_pairs + j0 + j, mask=j0 + j < HALF, other=0)
        else:
            word = _load(x_pairs, m, j0 + j, x.row // 2, 1, M, HALF)
        even, odd = _split_pair(word, DTYPE)
        if SUMS or b_down is not None:
            k = 2 * j0 + tl.arange(0, BLOCK_K)
            x_tile = _read(x, m, k, M, K)
            if SUMS:
                sigma_acc += x_tile.to(tl.float32) if ONE else tl.sum(x_tile.to(tl.float32), 1)
            if b_down is not None:
                if ONE:
                    h_acc += _read(b_down, r, k, R, K).to(tl.float32) * x_tile.to(tl.float32)
                else:
                    down = _read(_transposed(b_down), k, r, K, R).to(NUMERICS.factor_dtype)
                    h_acc = _dot_thin(x_tile, down, h_acc, NUMERICS)
        of_byte = tl.broadcast_to(absmax[:, :, None], (BLOCK_N, BLOCK_H // _RUN, _RUN))
        of_byte = tl.reshape(of_byte, (BLOCK_N, BLOCK_H))
        number = byte.to(tl.int32)
        high = _nearest(_decode(number >> 4, codes.kind) * of_byte, DTYPE, UPCAST)
        low = _nearest(_decode(number & 15, codes.kind) * of_byte, DTYPE, UPCAST)
        if ONE:
            z_acc += high.to(tl.float32) * even.to(tl.float32)[None, :]
            z_acc += low.to(tl.float32) * odd.to(tl.float32)[None, :]
        else:
            z_acc = _dot_wide(even, high.T, z_acc, NUMERICS)
            z_acc = _dot_wide(odd, low.T, z_acc, NUMERICS)
        byte = next_byte
        absmax = next_absmax
    if ONE:
        tile = tl.sum(z_acc, 1)[None, :]
    else:
        tile = z_acc
    h_tile = None
    if b_down is not None:
        if ONE:
            h_tile = tl.sum(h_acc, 1)[None, :]
        else:
            h_tile = h_acc
        h_tile = _nearest(h_tile * scale, NUMERICS.factor_dtype, UPCAST)
        if h is not None:
            if tl.program_id(0) == 0:
                _write(h, h_tile, m, r, M, R)
    elif h is not None:
        h_tile = _read(h, m, r, M, R).to(NUMERICS.factor_dtype)
    row_sums = None
    if SUMS:
        # One use of a loop's sum: Triton 3.7 asserts it in a pass.
        row_sums = tl.sum(sigma_acc, 1) if ONE else sigma_acc + 0.0
        if sigma is not None:
            if tl.program_id(0) == 0:
                tl.store(sigma + m, row_sums, mask=m < M)
    tile = _add_terms(
        tile, terms, None, h_tile, row_sums, m, n, M, N, 0, R, 1, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_R
    )  # fmt: skip
    _write(y, _nearest(tile, y.ptr.dtype.element_ty, UPCAST), m, n, M, N)


@triton.jit
def _small_h_kernel(x, b_down, h, K, R, scale, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """h[m,r] = scale·Σₖ x[m,k]·B_down[r,k], one program a number: latency counts here, not traffic."""
    m = (tl.program_id(0) // R).to(tl.int64)
    r = (tl.program_id(0) % R).to(tl.int64)
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        row = _load_vector(x.ptr + m * x.row, k, x.col, K)
        acc += row * _load_vector(b_down.ptr + r * b_down.row, k, b_down.col, K)
    value = _nearest(tl.sum(acc, 0) * scale, h.ptr.dtype.element_ty, UPCAST)
    tl.store(h.ptr + m * h.row + r * h.col, value)
