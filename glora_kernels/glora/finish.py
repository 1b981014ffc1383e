"""The end of a backward: partial sums become gradients, in one launch and a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.operands import NO_COLUMNS, Anew, Columns, Parts, Sum
from glora_kernels.reference import recovery
from glora_kernels.runtime import tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, matrix, numerics, options, vector
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted

_TINY = tl.constexpr(recovery.TINY)


_RANK_STEP = 16
"""How many columns of dyᵀ[P|h] one program adds up, at any rank."""


@triton.jit
def _add_up(ptr, step, end, index, mask):
    """Σ ptr[at + index] over at = 0, step, 2·step … < end, in fp32."""
    total = tl.zeros(index.shape, tl.float32)
    for at in tl.range(0, end, step, loop_unroll_factor=4):
        total += tl.load(ptr + at + index, mask=mask, other=0.0)
    return total


@triton.jit
def _keep(ptr, value, index, mask):
    """Store a gradient in its dtype; nothing if `ptr` is None."""
    if ptr is not None:
        tl.store(ptr + index, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_tile(item, t, BLOCK: tl.constexpr):
    """Add up tile t of one `Sum`."""
    i = tl.cast(t, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < item.step
    _keep(item.out, _add_up(item.ptr, item.step, item.end, i, inside), i, inside)


@triton.jit
def _factor_tile(factor, du, db_up, t, N, P, R, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of du (N,P) and db_up (N,R), from the partial sums (P+R,N) of dyᵀ[P|h]."""
    across = tl.cdiv(N, BLOCK_N)
    c = (t // across * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    n = (t % across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (c < P + R) & (n < N)
    n = n.to(tl.int64)
    total = _add_up(factor.ptr, factor.step, factor.end, c.to(tl.int64) * factor.row + n, inside)
    _keep(du, total, n * P + c, inside & (c < P))
    _keep(db_up, total, n * R + (c - P), inside & (c >= P))


@triton.jit
def _vector_gradients(columns, n, N):
    """dwc = de = g, dbias = g∘(1+d) and dd = g∘bias of g = Σ dy, and db = dyᵀσ, of the columns n."""
    inside = n < N
    if columns.g is not None:
        g = _add_up(columns.g, columns.step, columns.end, n, inside)
        _keep(columns.dwc, g, n, inside)
        _keep(columns.de, g, n, inside)
        if columns.d is not None:
            _keep(columns.dbias, g + g * tile.read_vector(columns.d, n, N), n, inside)
        else:
            _keep(columns.dbias, g, n, inside)
        if columns.dd is not None:
            _keep(columns.dd, g * tile.read_vector(columns.bias, n, N), n, inside)
    if columns.sigma is not None:
        _keep(columns.db, _add_up(columns.sigma, columns.step, columns.end, n, inside), n, inside)


@triton.jit
def _da_from_x(
    anew, n, M, N, K,
    NUMERICS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σₘ dy∘Z of the columns n, with Z = x·Wᵀ computed again."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tile.read(anew.x, m, k, M, K)
            w = tile.read(tile.transposed(anew.w), k, n, K, N).to(tile.dtype_of(NUMERICS.name))
            z = tile.dot_wide(x, w, z, NUMERICS)
        total += tl.sum(tile.read(anew.dy, m, n, M, N).to(tl.float32) * z, 0)
    return total


@triton.jit
def _scale_gradient(
    columns, anew, n, M, N, K,
    NUMERICS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da of a vector or constant A: Σₘ dy∘Z = Σₘ q/(1+a), with q = dy∘Z∘(1+a) as `_dy_kernel` took it from y.

    Z is computed again from x where that is inaccurate: the other terms of y are too large (a judge sum is > 0),
    |1+a| < TINY, or the sum is not finite (`glora.recover`).
    """
    inside = n < N
    total = _add_up(columns.q, columns.step, columns.end, n, inside)
    scale = 1.0 + tile.read_vector(columns.a, n, N)
    # Every comparison is false for NaN, so that such columns are computed again.
    kept = (tl.abs(scale) >= _TINY) & (tl.abs(total) < float("inf"))
    if columns.judges is not None:
        kept &= _add_up(columns.judges, columns.step, columns.end, n, inside) <= 0.0
        kept &= _add_up(columns.judges + columns.end, columns.step, columns.end, n, inside) <= 0.0
    da = total / tl.where(kept, scale, 1.0)
    if tl.min(kept.to(tl.int32), 0) == 0:
        da = tl.where(kept, da, _da_from_x(anew, n, M, N, K, NUMERICS, BLOCK_N, BLOCK_M, BLOCK_K))
    _keep(columns.da, da, n, inside)


@triton.jit(do_not_specialize=["M", "P", "R"])
def _finish_kernel(
    factor, du, db_up, columns, anew, sums, M, N, K, P, R,
    NUMERICS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up partial sums into gradients: vectors (N,), du and db_up, and any `sums`, each by programs of its own."""
    pid = tl.program_id(0)
    first = 0
    if columns.end is not None:
        first = tl.cdiv(N, BLOCK_N)
        if pid < first:
            n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
            _vector_gradients(columns, n, N)
            if columns.q is not None:
                _scale_gradient(columns, anew, n, M, N, K, NUMERICS, BLOCK_N, BLOCK_M, BLOCK_K)
    if factor is not None:
        tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(P + R, BLOCK_C)
        if (pid >= first) & (pid < first + tiles):
            _factor_tile(factor, du, db_up, pid - first, N, P, R, BLOCK_C, BLOCK_N)
        first += tiles
    for i in tl.static_range(len(sums)):
        tiles = tl.cdiv(sums[i].step, BLOCK)
        if (pid >= first) & (pid < first + tiles):
            _sum_tile(sums[i], pid - first, BLOCK)
        first += tiles


def parts(tensor: Tensor, count: int) -> Parts:
    """`count` partial sums of a matrix, tensor[i], as `Parts`."""
    step = tensor.stride(0)
    return Parts(tensor, tensor.stride(1), step, count * step)


def summed(tensor: Tensor, out: Tensor) -> Sum:
    """out = Σ tensor[i] as a `Sum`; both are contiguous."""
    size = out.numel()
    return Sum(tensor, size, len(tensor) * size, out)


def finish_launch(
    *, columns: Columns = NO_COLUMNS, anew: Anew | None = None, factor: Parts | None = None,
    du: Tensor | None = None, db_up: Tensor | None = None, n: int = 0, ranks: tuple[int, int] = (0, 0),
    sums: Sequence[Sum] = (), dtype: torch.dtype, arch: str,
) -> Launch:  # fmt: skip
    """The gradients of `columns`; du (N,P) and db_up (N,R) from `factor`, partial sums (P+R,N); and the `sums`.

    `columns` and `anew` hold tensors; `anew` is needed for da alone. `ranks`: (P, R). `dtype`: that of dy, in which
    Z is computed again.
    """
    beside = Beside(arch, dtype)
    if anew is not None:
        beside = beside._replace(aligned=anew.x.stride(0) % 16 == 0, cast=anew.w.dtype != dtype)
    config = fitted("finish", tables.choose("finish", arch, dtype, Shape(0, n, 0, sum(ranks))), beside)
    across, block = cdiv(n, config["cols"]), config["rows"] * config["cols"]
    vectors = {name: vector(getattr(columns, name)) for name in ("a", "bias", "d")}
    grid = across * (columns.end is not None) + across * cdiv(sum(ranks), _RANK_STEP) * (factor is not None)
    for item in sums:
        grid = cdiv(item.step, block) + grid
    args = {
        "factor": factor, "du": du, "db_up": db_up, "columns": columns._replace(**vectors),
        "anew": None if anew is None else Anew(*map(matrix, anew)),
        "sums": tuple(sums),
        "M": 0 if anew is None else rows(anew.x), "N": n, "K": 0 if anew is None else anew.x.shape[1],
        "P": ranks[0], "R": ranks[1],
        "NUMERICS": numerics(dtype),
        "BLOCK_N": config["cols"], "BLOCK_C": _RANK_STEP, "BLOCK_M": config["tokens"], "BLOCK_K": config["depth"],
        "BLOCK": block,
    }  # fmt: skip
    return Launch(_finish_kernel, (grid,), args, options(config))


@triton.jit
def _total(vectors_ptr, out_ptr, i, N, BLOCK_N: tl.constexpr):
    """out[i] = Σₙ vectors[i,n]."""
    row = vectors_ptr + tl.cast(i, tl.int64) * N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        total += tl.load(row + n, mask=n < N, other=0.0)
    tl.store(out_ptr + i, tl.sum(total, 0).to(out_ptr.dtype.element_ty))


@triton.jit
def _totals_kernel(vectors_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    """out[i] = Σₙ vectors[i,n]: the gradients of constants, one program each, where `_glora_dx_kernel` does not run."""
    _total(vectors_ptr, out_ptr, tl.program_id(0), N, BLOCK_N)


def totals_launch(vectors: Tensor, out: Tensor) -> Launch:
    """out (I,) = Σₙ vectors (I,N) in fp32: the gradients of constants."""
    args = {"vectors_ptr": vectors, "out_ptr": out, "N": vectors.shape[1], "BLOCK_N": 1024}
    return Launch(_totals_kernel, (vectors.shape[0],), args, {"num_warps": 4, "num_stages": 1})
