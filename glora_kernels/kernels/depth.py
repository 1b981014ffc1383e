"""Work over all layers of a model in one launch: merge, restore, β and its gradients, gradients of shared factors.

The operands of layer l are row l of a table of 64-bit integers on the device: addresses (0: absent), sizes, strides
and the bits of fp32 scalars (`launch.table`). Sizes are ragged: a launch has as many programs a layer as the largest
needs, and those beyond a layer's own end return at once. A program owns what it writes: no atomics, no flags.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import _dot, _dot_thin, _dropped, _load, _store

LAYER_COLUMNS = (
    "weight", "stride", "N", "K", "scale", "rank_a", "rank_b", "rank_c", "rank_p",
    "a", "a_stride", "b", "b_stride", "bias", "bias_stride", "c", "c_stride", "d", "d_stride", "e", "e_stride",
    "a_up", "a_down", "b_up", "b_down", "c_up", "c_down",
    "beta", "g", "dbias", "dc", "dc_up", "dc_down", "dc_wide", "dd", "de",
)  # fmt: skip
"""One layer. rank_p instead of rank_a in the product variant; the stride of a vector follows it, 0 for a constant.

beta: where the full bias goes. g: ∂β, fp32. d…: where the gradients go; dc_wide: dc in fp32, for dC_down.
"""

COPY_COLUMNS = ("target", "source", "size", "bias_target", "bias_source", "bias_size")
"""One layer to restore: two copies from `source` to `target`, sizes in elements."""

FACTOR_COLUMNS = ("first", "count", "R", "C", "out", "stride_r", "stride_c")
"""One shared factor: its (R, C) gradient, and its rows first … first+count of the other table."""

PRODUCT_COLUMNS = (
    "left", "left_stride_m", "left_stride_r", "right", "right_stride_m", "M", "scale", "seed", "seed_address",
    "threshold",
)  # fmt: skip
"""One layer's part of a shared factor's gradient: scale·leftᵀ·drop(right), left (M,R), right (M,C)."""


def _layer(name):
    return tl.constexpr(LAYER_COLUMNS.index(name))


_LAYER_WIDTH = tl.constexpr(len(LAYER_COLUMNS))
_WEIGHT, _STRIDE, _N, _K, _SCALE = _layer("weight"), _layer("stride"), _layer("N"), _layer("K"), _layer("scale")
_RANK_A, _RANK_B, _RANK_C, _RANK_P = _layer("rank_a"), _layer("rank_b"), _layer("rank_c"), _layer("rank_p")
_A, _B, _BIAS, _C, _D, _E = _layer("a"), _layer("b"), _layer("bias"), _layer("c"), _layer("d"), _layer("e")
_D_STRIDE, _E_STRIDE = _layer("d_stride"), _layer("e_stride")
_A_UP, _A_DOWN, _B_UP, _B_DOWN = _layer("a_up"), _layer("a_down"), _layer("b_up"), _layer("b_down")
_C_UP, _C_DOWN, _BETA, _G = _layer("c_up"), _layer("c_down"), _layer("beta"), _layer("g")
_DBIAS, _DC, _DC_UP, _DC_DOWN = _layer("dbias"), _layer("dc"), _layer("dc_up"), _layer("dc_down")
_DC_WIDE, _DD, _DE = _layer("dc_wide"), _layer("dd"), _layer("de")

_COPY_WIDTH, _FACTOR_WIDTH = tl.constexpr(len(COPY_COLUMNS)), tl.constexpr(len(FACTOR_COLUMNS))
_PRODUCT_WIDTH = tl.constexpr(len(PRODUCT_COLUMNS))
_TARGET, _SOURCE, _SIZE, _BIAS_TARGET, _BIAS_SOURCE, _BIAS_SIZE = map(tl.constexpr, range(len(COPY_COLUMNS)))
_FIRST, _COUNT, _R, _COLS, _OUT, _STRIDE_R, _STRIDE_C = map(tl.constexpr, range(len(FACTOR_COLUMNS)))
_LEFT, _LEFT_M, _LEFT_R, _RIGHT, _RIGHT_M, _M, _PART_SCALE, _SEED, _SEED_ADDRESS, _THRESHOLD = map(
    tl.constexpr, range(len(PRODUCT_COLUMNS))
)


@triton.jit
def _number(row, COLUMN: tl.constexpr, ALIGN: tl.constexpr = 1):
    """A 64-bit entry. The compiler knows nothing of what comes out of memory: ALIGN tells it a divisor."""
    return tl.multiple_of(tl.load(row + COLUMN), ALIGN)


@triton.jit
def _size(row, COLUMN: tl.constexpr, ALIGN: tl.constexpr = 1):
    """A 32-bit entry."""
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.int32), ALIGN)


@triton.jit
def _real(row, COLUMN: tl.constexpr):
    """The fp32 number whose bits an entry is."""
    return tl.load(row + COLUMN).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr = 1):
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _strides(row, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr):
    """(stride_n, stride_k) of a weight stored (N,K), or (K,N) if TRANSPOSED; one of them is known to be 1."""
    stride = _number(row, _STRIDE, ALIGN)
    if TRANSPOSED:
        return 1, stride
    else:
        return stride, 1


@triton.jit
def _vector(row, COLUMN: tl.constexpr, index, size, DTYPE: tl.constexpr):
    """A vector (or constant) in fp32 at `index`; zeros outside, and where it is absent."""
    address = tl.load(row + COLUMN)
    offsets = index.to(tl.int64) * tl.load(row + COLUMN + 1)
    mask = (index < size) & (address != 0)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(row, COLUMN: tl.constexpr, value, index, size, DTYPE: tl.constexpr):
    """Store a vector where its address is given."""
    address = tl.load(row + COLUMN)
    mask = (index < size) & (address != 0)
    tl.store(address.to(tl.pointer_type(DTYPE)) + index.to(tl.int64), value.to(DTYPE), mask=mask)


@triton.jit
def _put_sum(row, COLUMN: tl.constexpr, value, DTYPE: tl.constexpr):
    """Store a gradient of a constant where its address is given."""
    address = tl.load(row + COLUMN)
    if address != 0:
        tl.store(address.to(tl.pointer_type(DTYPE)), value.to(DTYPE))


@triton.jit
def _c_values(row, k, K, ADAPTER: tl.constexpr, BLOCK_R: tl.constexpr):
    """c[k] in fp32: given, or Σᵣ C_up[k,r]·C_down[r]; zeros where there is no C."""
    c = _vector(row, _C, k, K, ADAPTER)
    rank = _size(row, _RANK_C)
    up_ptr, down_ptr = _pointer(row, _C_UP, ADAPTER), _pointer(row, _C_DOWN, ADAPTER)
    for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        down = tl.load(down_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
        c += tl.sum(_load(up_ptr, k, r, rank, 1, K, rank).to(tl.float32) * down[None, :], 1)
    return c


@triton.jit
def _store_beta(row, n, N, wc, ADAPTER: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr):
    """β[n] = b + b∘d + e + wc to the address that `beta` gives."""
    beta = _vector(row, _BIAS, n, N, BIAS)
    beta += beta * _vector(row, _D, n, N, ADAPTER)
    beta += _vector(row, _E, n, N, ADAPTER)
    _put(row, _BETA, beta + wc, n, N, OUT)


@triton.jit
def _exact_dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left·right: of one 16-bit dtype as they are (their products are exact in fp32), else in fp32."""
    if left.dtype != right.dtype:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return _dot(left, right, acc, PRECISION, UPCAST)


@triton.jit
def _factors(
    up_ptr,
    down_ptr,
    n,
    k,
    N,
    K,
    rank,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Σᵣ up[n,r]·down[r,k] of contiguous factors; zeros at rank 0."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        up = _load(up_ptr, n, r, rank, 1, N, rank)
        acc = _exact_dot(up, _load(down_ptr, r, k, K, 1, rank, K), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _merge_kernel(
    table_ptr,
    HAS_LOW_A: tl.constexpr,
    HAS_LOW_B: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    ADAPTER: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """W ← W + W∘A + s·B (or W + W·A + s·B) in place and β = b + b∘d + e + W·c, of every layer of a table.

    A program owns the rows n of W that it reads and overwrites; in the product variant it reads them twice, first for
    P = W·A_up. The sums are the literal ones, in fp32 and their order (the launch forbids fused multiply-adds), and
    rounded once. The HAS_ flags say what any layer of the table has; a layer's own forms are in its row.
    """
    row = table_ptr + tl.program_id(1).to(tl.int64) * _LAYER_WIDTH
    N = _size(row, _N, ALIGN if TRANSPOSED else 1)
    if tl.program_id(0) * BLOCK_N >= N:
        return
    K = _size(row, _K, ALIGN)
    w_ptr = _pointer(row, _WEIGHT, DTYPE, ALIGN)
    stride_n, stride_k = _strides(row, TRANSPOSED, ALIGN)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank_a, rank_b, rank_p = _size(row, _RANK_A), _size(row, _RANK_B), _size(row, _RANK_P)
    a_up, a_down = _pointer(row, _A_UP, ADAPTER), _pointer(row, _A_DOWN, ADAPTER, ALIGN)
    b_up, b_down = _pointer(row, _B_UP, ADAPTER), _pointer(row, _B_DOWN, ADAPTER, ALIGN)
    a, b = _vector(row, _A, n, N, ADAPTER), _vector(row, _B, n, N, ADAPTER)
    has_a, has_b = (_number(row, _A) != 0) | (rank_a > 0), (_number(row, _B) != 0) | (rank_b > 0)
    scale = _real(row, _SCALE)
    if HAS_PRODUCT:
        r = tl.arange(0, BLOCK_P)
        p = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        if rank_p > 0:
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                w = _load(w_ptr, n, k, stride_n, stride_k, N, K)
                up = _load(a_up, k, r, rank_p, 1, K, rank_p)
                p = _exact_dot(w, up, p, PRECISION, UPCAST)
    if HAS_C:
        wc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        has_c = (_number(row, _C) != 0) | (_size(row, _RANK_C) > 0)
    following = _load(w_ptr, n, tl.arange(0, BLOCK_K), stride_n, stride_k, N, K)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = following.to(tl.float32)
        following = _load(w_ptr, n, k + BLOCK_K, stride_n, stride_k, N, K)
        merged = w
        if HAS_C:
            if has_c:
                wc += w * _c_values(row, k, K, ADAPTER, BLOCK_R)[None, :]
        if has_a:
            term = tl.broadcast_to(a[:, None], (BLOCK_N, BLOCK_K))
            if HAS_LOW_A:
                term += _factors(
                    a_up, a_down, n, k, N, K, rank_a, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R
                )  # fmt: skip
            merged += w * term
        if HAS_PRODUCT:
            if rank_p > 0:
                down = _load(a_down, r, k, K, 1, rank_p, K)
                merged += _exact_dot(p, down, tl.zeros((BLOCK_N, BLOCK_K), tl.float32), PRECISION, UPCAST)
        if has_b:
            term = tl.broadcast_to(b[:, None], (BLOCK_N, BLOCK_K))
            if HAS_LOW_B:
                term += scale * _factors(
                    b_up, b_down, n, k, N, K, rank_b, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R
                )  # fmt: skip
            merged += term
        _store(w_ptr, merged, n, k, stride_n, stride_k, N, K)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_C:
        total = tl.sum(wc, 1)
    _store_beta(row, n, N, total, ADAPTER, BIAS, BIAS)


@triton.jit
def _copy(row, TO: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr, WORD: tl.constexpr, ALIGN: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Block `program_id(0)` of one copy; nothing beyond its end."""
    size = _number(row, COUNT, ALIGN)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < size:
        i = first + tl.arange(0, BLOCK)
        value = tl.load(_pointer(row, FROM, WORD, ALIGN) + i, mask=i < size)
        tl.store(_pointer(row, TO, WORD, ALIGN) + i, value, mask=i < size)


@triton.jit
def _restore_kernel(
    table_ptr, WORD: tl.constexpr, BIAS_WORD: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Every layer's weight and bias back from their copies, as integers of their width: bit for bit."""
    row = table_ptr + tl.program_id(1).to(tl.int64) * _COPY_WIDTH
    _copy(row, _TARGET, _SOURCE, _SIZE, WORD, ALIGN, BLOCK)
    _copy(row, _BIAS_TARGET, _BIAS_SOURCE, _BIAS_SIZE, BIAS_WORD, 1, BLOCK)


@triton.jit
def _shift_kernel(
    table_ptr,
    HAS_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    ADAPTER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """β = b + b∘d + e + W·c in fp32, of every layer of a table; W is read where a layer has a C."""
    row = table_ptr + tl.program_id(1).to(tl.int64) * _LAYER_WIDTH
    N = _size(row, _N, ALIGN if TRANSPOSED else 1)
    if tl.program_id(0) * BLOCK_N >= N:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_C:
        if (_number(row, _C) != 0) | (_size(row, _RANK_C) > 0):
            K = _size(row, _K, ALIGN)
            w_ptr = _pointer(row, _WEIGHT, DTYPE, ALIGN)
            stride_n, stride_k = _strides(row, TRANSPOSED, ALIGN)
            wc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            following = _load(w_ptr, n, tl.arange(0, BLOCK_K), stride_n, stride_k, N, K)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                w = following.to(tl.float32)
                following = _load(w_ptr, n, k + BLOCK_K, stride_n, stride_k, N, K)
                wc += w * _c_values(row, k, K, ADAPTER, BLOCK_R)[None, :]
            total = tl.sum(wc, 1)
    _store_beta(row, n, N, total, ADAPTER, BIAS, tl.float32)


@triton.jit
def _shift_grad_kernel(
    table_ptr,
    TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    ADAPTER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradients of `_shift_kernel` from g = ∂β, those that have an address.

    The first programs of a layer own columns of dc[k] = Σₙ W[n,k]·g[n], and with them dC_up[k,r] = dc[k]·C_down[r];
    dC_down = C_upᵀ·dc needs all of dc, which they leave in fp32 (`_shift_down_kernel`). One more program has db =
    g∘(1+d), dd = g∘b and de = g, the last two summed for constants.
    """
    row = table_ptr + tl.program_id(1).to(tl.int64) * _LAYER_WIDTH
    N, K = _size(row, _N, ALIGN if TRANSPOSED else 1), _size(row, _K, ALIGN)
    g_ptr = _pointer(row, _G, tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    if (_number(row, _DC) | _number(row, _DC_UP) | _number(row, _DC_WIDE)) == 0:
        blocks = 0
    i = tl.program_id(0)
    if i < blocks:
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        w_ptr = _pointer(row, _WEIGHT, DTYPE, ALIGN)
        stride_n, stride_k = _strides(row, TRANSPOSED, ALIGN)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        following = _load(w_ptr, tl.arange(0, BLOCK_N), k, stride_n, stride_k, N, K)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            w = following.to(tl.float32)
            following = _load(w_ptr, n + BLOCK_N, k, stride_n, stride_k, N, K)
            acc += w * tl.load(g_ptr + n, mask=n < N, other=0.0)[:, None]
        dc = tl.sum(acc, 0)
        _put(row, _DC, dc, k, K, ADAPTER)
        _put(row, _DC_WIDE, dc, k, K, tl.float32)
        if _number(row, _DC_UP) != 0:
            rank = _size(row, _RANK_C)
            down_ptr, dc_up_ptr = _pointer(row, _C_DOWN, ADAPTER), _pointer(row, _DC_UP, ADAPTER)
            for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                down = tl.load(down_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
                _store(dc_up_ptr, dc[:, None] * down[None, :], k, r, rank, 1, K, rank)
    elif i == blocks:
        d_sum = tl.zeros((BLOCK_V,), tl.float32)
        e_sum = tl.zeros((BLOCK_V,), tl.float32)
        d_is_vector, e_is_vector = _number(row, _D_STRIDE) != 0, _number(row, _E_STRIDE) != 0
        for n0 in range(0, N, BLOCK_V):
            n = n0 + tl.arange(0, BLOCK_V)
            g = tl.load(g_ptr + n, mask=n < N, other=0.0)
            _put(row, _DBIAS, g + g * _vector(row, _D, n, N, ADAPTER), n, N, BIAS)
            dd = g * _vector(row, _BIAS, n, N, BIAS)
            d_sum += dd
            e_sum += g
            if d_is_vector:
                _put(row, _DD, dd, n, N, ADAPTER)
            if e_is_vector:
                _put(row, _DE, g, n, N, ADAPTER)
        if not d_is_vector:
            _put_sum(row, _DD, tl.sum(d_sum, 0), ADAPTER)
        if not e_is_vector:
            _put_sum(row, _DE, tl.sum(e_sum, 0), ADAPTER)


@triton.jit
def _shift_down_kernel(table_ptr, ADAPTER: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """dC_down[r] = Σₖ C_up[k,r]·dc[k] of every layer that has an address for it."""
    row = table_ptr + tl.program_id(1).to(tl.int64) * _LAYER_WIDTH
    rank = _size(row, _RANK_C)
    if (_number(row, _DC_DOWN) == 0) | (tl.program_id(0) * BLOCK_R >= rank):
        return
    K = _size(row, _K)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    up_ptr, dc_ptr = _pointer(row, _C_UP, ADAPTER), _pointer(row, _DC_WIDE, tl.float32)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        dc = tl.load(dc_ptr + k, mask=k < K, other=0.0)
        acc += _load(up_ptr, k, r, rank, 1, K, rank).to(tl.float32) * dc[:, None]
    _put(row, _DC_DOWN, tl.sum(acc, 0), r, rank, ADAPTER)


@triton.jit
def _shared_grad_kernel(
    factor_ptr,
    product_ptr,
    HAS_DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Σ_l scale_l·left_lᵀ·(mask∘right_l) (R,C) of every shared factor, in fp32, in the order of the table's layers."""
    factor = factor_ptr + tl.program_id(2).to(tl.int64) * _FACTOR_WIDTH
    R, C = _size(factor, _R), _size(factor, _COLS, ALIGN)
    c0, r0 = tl.program_id(0) * BLOCK_C, tl.program_id(1) * BLOCK_R
    if (c0 >= C) | (r0 >= R):
        return
    c, r = c0 + tl.arange(0, BLOCK_C), r0 + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = _size(factor, _FIRST)
    for member in range(first, first + _size(factor, _COUNT)):
        row = product_ptr + tl.cast(member, tl.int64) * _PRODUCT_WIDTH
        left, right = _pointer(row, _LEFT, NUMERICS.factor_dtype), _pointer(row, _RIGHT, NUMERICS.dtype, ALIGN)
        left_m, left_r, right_m = _number(row, _LEFT_M), _number(row, _LEFT_R), _number(row, _RIGHT_M, ALIGN)
        M = _size(row, _M)
        if HAS_DROPOUT:
            seed, seed_ptr = _number(row, _SEED), _pointer(row, _SEED_ADDRESS, tl.int64)
            if _number(row, _SEED_ADDRESS) != 0:
                seed = tl.load(seed_ptr)
            threshold = _size(row, _THRESHOLD)
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            x = _load(right, m, c, right_m, 1, M, C)
            if HAS_DROPOUT:
                if threshold > 0:
                    x = _dropped(x, seed, m, c0, threshold, 1.0, BLOCK_M, BLOCK_C)
            acc = _dot_thin(_load(left, r, m, left_r, left_m, R, M), x, acc, NUMERICS)
        total += acc * _real(row, _PART_SCALE)
    out = _pointer(factor, _OUT, OUT)
    stride_r, stride_c = _number(factor, _STRIDE_R), _number(factor, _STRIDE_C)
    _store(out, total, r, c, stride_r, stride_c, R, C)
