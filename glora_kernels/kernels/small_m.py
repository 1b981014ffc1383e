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
from glora_kernels.kernels.common import _dot, _load, _load_shift, _load_vector, _store

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
def _packed(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    n,
    first,
    N,
    HALF,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Bytes [first, first + BLOCK_H) of the rows n, and an absmax for every _RUN of them; zeros outside (N, HALF)."""
    row = n.to(tl.int64)[:, None]
    j = first + tl.arange(0, BLOCK_H)
    byte = tl.load(packed_ptr + row * HALF + j[None, :], mask=(n[:, None] < N) & (j[None, :] < HALF), other=0)
    run = first + tl.arange(0, BLOCK_H // _RUN) * _RUN
    block = row * (HALF // (BLOCKSIZE // 2)) + (run // (BLOCKSIZE // 2))[None, :]
    mask = (n[:, None] < N) & (run[None, :] < HALF)
    absmax = _absmax(
        absmax_ptr, block, nested_absmax_ptr, nested_code_ptr, offset_ptr, mask, NESTED, NESTED_BLOCKSIZE
    )  # fmt: skip
    return byte, absmax


@triton.jit(do_not_specialize=["M"])
def _small_m_kernel(
    x_ptr,
    stride_xm,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    y_ptr,
    stride_ym,
    stride_yn,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    up_ptr,
    stride_upn,
    stride_upr,
    h_ptr,
    stride_hm,
    stride_hr,
    sigma_ptr,
    a_ptr,
    stride_a,
    b_ptr,
    stride_b,
    bias_ptr,
    stride_bias,
    wc_ptr,
    d_ptr,
    stride_d,
    e_ptr,
    stride_e,
    M,
    N,
    K,
    HALF,
    R,
    scale,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WC: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_E: tl.constexpr,
    MAKE_H: tl.constexpr,
    STORE_H: tl.constexpr,
    MAKE_SIGMA: tl.constexpr,
    STORE_SIGMA: tl.constexpr,
    CODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[m,n] = (Σₖ x[m,k]·w[n,k])·(1+a[n]) + Σᵣ h[m,r]·B_up[n,r] + σ[m]·b[n] + β[n], w = code[nibble]·absmax in DTYPE.

    h[m,r] = scale·Σₖ x[m,k]·B_down[r,k], rounded to FACTOR_DTYPE, is made here (MAKE_H) or read; h and σ are stored by
    the first program where wanted. HALF = K/2 bytes are a row of W. BLOCK_M = 1, or a multiple of 16 with masks.
    """
    BLOCK_H: tl.constexpr = BLOCK_K // 2
    ONE: tl.constexpr = BLOCK_M == 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_H)
    x_pairs = _pairs(x_ptr, DTYPE)
    # Of one token, the sums over K are kept apart until the end: reducing in the loop would need shuffles.
    z_acc = tl.zeros((BLOCK_N, BLOCK_H) if ONE else (BLOCK_M, BLOCK_N), tl.float32)
    h_acc = tl.zeros((BLOCK_R, BLOCK_K) if ONE else (BLOCK_M, BLOCK_R), tl.float32)
    sigma_acc = tl.zeros((1, BLOCK_K) if ONE else (BLOCK_M,), tl.float32)
    byte, absmax = _packed(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, n, 0, N, HALF, BLOCKSIZE, NESTED,
        NESTED_BLOCKSIZE, BLOCK_H,
    )  # fmt: skip
    for j0 in range(0, HALF, BLOCK_H):
        next_byte, next_absmax = _packed(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, n, j0 + BLOCK_H, N, HALF,
            BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BLOCK_H,
        )  # fmt: skip
        if ONE:
            word = tl.load(x_pairs + j0 + j, mask=j0 + j < HALF, other=0)
        else:
            word = _load(x_pairs, m, j0 + j, stride_xm // 2, 1, M, HALF)
        even, odd = _split_pair(word, DTYPE)
        if MAKE_H or MAKE_SIGMA:
            k = 2 * j0 + tl.arange(0, BLOCK_K)
            x = _load(x_ptr, m, k, stride_xm, 1, M, K)
            if MAKE_SIGMA:
                sigma_acc += x.to(tl.float32) if ONE else tl.sum(x.to(tl.float32), 1)
            if MAKE_H:
                if ONE:
                    down = _load(b_down_ptr, r, k, stride_bdr, stride_bdk, R, K).to(tl.float32)
                    h_acc += down * x.to(tl.float32)
                else:
                    down = _load(b_down_ptr, k, r, stride_bdk, stride_bdr, K, R).to(FACTOR_DTYPE)
                    h_acc = _dot(x, down, h_acc, FACTOR_PRECISION, UPCAST)
        of_byte = tl.broadcast_to(absmax[:, :, None], (BLOCK_N, BLOCK_H // _RUN, _RUN))
        of_byte = tl.reshape(of_byte, (BLOCK_N, BLOCK_H))
        number = byte.to(tl.int32)
        high = _nearest(_decode(number >> 4, CODE) * of_byte, DTYPE, UPCAST)
        low = _nearest(_decode(number & 15, CODE) * of_byte, DTYPE, UPCAST)
        if ONE:
            z_acc += high.to(tl.float32) * even.to(tl.float32)[None, :]
            z_acc += low.to(tl.float32) * odd.to(tl.float32)[None, :]
        else:
            z_acc = _dot(even, high.T, z_acc, PRECISION, UPCAST)
            z_acc = _dot(odd, low.T, z_acc, PRECISION, UPCAST)
        byte = next_byte
        absmax = next_absmax
    if ONE:
        y = tl.sum(z_acc, 1)[None, :]
    else:
        y = z_acc
    if HAS_A:
        y *= 1.0 + _load_vector(a_ptr, n, stride_a, N)[None, :]
    if HAS_UP:
        if MAKE_H:
            if ONE:
                h = tl.sum(h_acc, 1)[None, :]
            else:
                h = h_acc
            h = _nearest(h * scale, FACTOR_DTYPE, UPCAST)
            if STORE_H:
                if tl.program_id(0) == 0:
                    _store(h_ptr, h, m, r, stride_hm, stride_hr, M, R)
        else:
            h = _load(h_ptr, m, r, stride_hm, stride_hr, M, R).to(FACTOR_DTYPE)
        if ONE:
            up = _load(up_ptr, n, r, stride_upn, stride_upr, N, R).to(tl.float32)
            y += tl.sum(up * h.to(tl.float32), 1)[None, :]
        else:
            up = _load(up_ptr, r, n, stride_upr, stride_upn, R, N).to(FACTOR_DTYPE)
            y += _dot(h, up, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), FACTOR_PRECISION, UPCAST)
    if MAKE_SIGMA:
        # One use of a loop's sum: Triton 3.7 asserts it in a pass.
        sigma = tl.sum(sigma_acc, 1) if ONE else sigma_acc + 0.0
        if STORE_SIGMA:
            if tl.program_id(0) == 0:
                tl.store(sigma_ptr + m, sigma, mask=m < M)
        if HAS_B:
            y += sigma[:, None] * _load_vector(b_ptr, n, stride_b, N)[None, :]
    if HAS_BIAS or HAS_WC or HAS_E:
        y += _load_shift(
            bias_ptr, stride_bias, wc_ptr, d_ptr, stride_d, e_ptr, stride_e, n, N, HAS_BIAS, HAS_WC, HAS_D, HAS_E
        )[None, :]  # fmt: skip
    _store(y_ptr, _nearest(y, y_ptr.dtype.element_ty, UPCAST), m, n, stride_ym, stride_yn, M, N)


@triton.jit
def _small_h_kernel(
    x_ptr,
    stride_xm,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    h_ptr,
    stride_hm,
    stride_hr,
    K,
    R,
    scale,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[m,r] = scale·Σₖ x[m,k]·B_down[r,k], one program a number: latency counts here, not traffic."""
    m = (tl.program_id(0) // R).to(tl.int64)
    r = (tl.program_id(0) % R).to(tl.int64)
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load_vector(x_ptr + m * stride_xm, k, 1, K)
        down = tl.load(b_down_ptr + r * stride_bdr + k.to(tl.int64) * stride_bdk, mask=k < K, other=0.0)
        acc += x * down.to(tl.float32)
    h = _nearest(tl.sum(acc, 0) * scale, h_ptr.dtype.element_ty, UPCAST)
    tl.store(h_ptr + m * stride_hm + r * stride_hr, h)
