"""A dense weight out of 4 bits: W as it is, or with the terms of GLoRA that change it."""

import triton
import triton.language as tl

from glora_kernels.kernels.codec import _absmax, _decode, _nearest, _shifts, _weight_tile
from glora_kernels.kernels.common import _load_vector, _round, _store
from glora_kernels.kernels.weight import _factor_product, _weff_tile


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    total,
    CODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """out[i] = level of nibble i · absmax[i // BLOCKSIZE] rounded to W_DTYPE, i < total, over the flat weight.

    A unit is what is read at once: a word of eight codes (WORDS: `total` is a multiple of 8, the packed weight starts
    at a multiple of 4 bytes) or a byte of two. It lies in one block.
    """
    COUNT: tl.constexpr = 8 if WORDS else 2
    unit = tl.program_id(0).to(tl.int64) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    mask = unit * COUNT < total
    if WORDS:
        packed = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + unit, mask=mask, other=0)
    else:
        packed = tl.load(packed_ptr + unit, mask=mask, other=0).to(tl.int32)
    absmax = _absmax(
        absmax_ptr, unit * COUNT // BLOCKSIZE, nested_absmax_ptr, nested_code_ptr, offset_ptr, mask, NESTED,
        NESTED_BLOCKSIZE,
    )  # fmt: skip
    level = _decode((packed[:, None] >> _shifts(COUNT)[None, :]) & 15, CODE)
    value = _nearest(level * absmax[:, None], W_DTYPE, UPCAST).to(tl.float32)
    value = _nearest(value, out_ptr.dtype.element_ty, UPCAST)
    element = unit[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    if WORDS:  # a mask a row, so that the compiler sees whole vectors to store
        tl.store(out_ptr + element, value, mask=mask[:, None])
    else:
        tl.store(out_ptr + element, value, mask=element < total)


@triton.jit
def _dequantize_adapted_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    a_ptr,
    stride_a,
    a_up_ptr,
    stride_aun,
    stride_aur,
    a_down_ptr,
    stride_adr,
    stride_adk,
    b_ptr,
    stride_b,
    b_up_ptr,
    stride_bun,
    stride_bur,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    out_ptr,
    N,
    K,
    P,
    R,
    scale,
    CODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_A_LORA: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_B_LORA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[n,k] = w + w·a + b: a[n] or Σ_p A_up[n,p]·A_down[p,k]; b[n] or scale·Σ_r B_up[n,r]·B_down[r,k].

    In fp32, rounded once and so that the mean of a small adapter stays.
    """
    across = tl.cdiv(K, BLOCK_K)
    first_n = (tl.program_id(0) // across) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    first_k = (tl.program_id(0) % across) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    w = _weight_tile(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first_n, first_k, N, K, CODE, BLOCKSIZE,
        NESTED, NESTED_BLOCKSIZE, W_DTYPE, WORDS, UPCAST, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # As it is without A and B, so that adapters of zero change nothing: a value that is exact in 16 bits stays.
    w = _nearest(w, out_ptr.dtype.element_ty, UPCAST).to(tl.float32)
    if HAS_A:
        w += w * _load_vector(a_ptr, n, stride_a, N)[:, None]
    if HAS_A_LORA:
        w = _weff_tile(
            w, a_up_ptr, stride_aun, stride_aur, a_down_ptr, stride_adr, stride_adk, n, k, N, K, P, PRECISION, UPCAST,
            BLOCK_N, BLOCK_K, BLOCK_P,
        )  # fmt: skip
    if HAS_B:
        w += _load_vector(b_ptr, n, stride_b, N)[:, None]
    if HAS_B_LORA:
        w += scale * _factor_product(
            b_up_ptr, stride_bun, stride_bur, b_down_ptr, stride_bdr, stride_bdk, n, k, N, K, R, PRECISION, UPCAST,
            BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    _store(out_ptr, _round(w, n, k, out_ptr.dtype.element_ty), n, k, K, 1, N, K)
