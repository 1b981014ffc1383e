"""y for a few tokens and a 4-bit weight in one launch, which reads the packed weight once.

One program owns BLOCK_N rows of W and all M tokens, and walks K. A byte holds neighbours (k, k+1) of a row: instead of
interleaving the decoded nibbles, x is read as pairs and split, Z = x_even·W_highᵀ + x_odd·W_lowᵀ. So values of W need
no shuffles, and one absmax serves the 16 bytes that a thread reads. The bytes of the next step are requested before
those of this one are decoded. M = 1 adds products in registers; more tokens use the matrix unit.

Every program needs h = s·x·B_downᵀ. If each computes it, each reads all of B_down from the L2: N/BLOCK_N·R·K·2 bytes in
addition to the N·K·0.5625 of W (fp32 absmax, blocks of 64). On an H100 (3 TB/s, L2 5.5 TB/s), M = 1, R = 16, µs for W
alone → W and B_down through the L2: gate (14336,4096), BLOCK_N 64: 11.0 → 11.2; down (4096,14336), 32: 11.0 → 16.7;
q (4096,4096), 32: 3.1 → 4.8; k (1024,4096), 16: 0.8 → 2.0. Another launch costs about 2.5 µs: so h is computed in this
kernel for all but down_proj and large ranks, for which `_small_h_kernel` runs first (`h_before`).
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.four_bit.codec import _absmax, _decode, _nearest, codes
from glora_kernels.four_bit.served import why_not
from glora_kernels.operands import W_ALONE, Matrix, Terms, Vector
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, halves, matrix, numerics, options, terms_of
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted

_RUN = tl.constexpr(16)
"""Bytes that a thread loads at once: 32 codes, which share an absmax at any block size."""


@triton.jit
def _pairs(ptr, DTYPE: tl.constexpr):
    """A pointer to DTYPE as a pointer to words that hold two numbers of DTYPE."""
    if tl.float32 == DTYPE:
        return ptr.to(tl.pointer_type(tl.int64))
    else:
        return ptr.to(tl.pointer_type(tl.int32))


@triton.jit
def _split_pair(word, DTYPE: tl.constexpr):
    """The two numbers of a little-endian word, the one at the lower address first."""
    if tl.float32 == DTYPE:
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

    With `b_down`, h[m,r] = scale·Σₖ x[m,k]·B_down[r,k], rounded to the factors' dtype, is computed here, and the first
    program stores it if `h` is not None; without, h is read. σ is computed here too, and stored in `sigma`. A row of W
    is K/2 bytes. BLOCK_M is 1, or a multiple of 16 with masked rows.
    """
    DTYPE: tl.constexpr = tile.dtype_of(NUMERICS.name)
    UPCAST: tl.constexpr = NUMERICS.upcast
    SUMS: tl.constexpr = terms.b is not None or sigma is not None
    BLOCK_H: tl.constexpr = BLOCK_K // 2
    ONE: tl.constexpr = BLOCK_M == 1
    HALF = tl.multiple_of(K // 2, 16)  # `served.why_not` checks this
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_H)
    x_pairs = _pairs(x.ptr, DTYPE)
    # With one token, a thread keeps its own sums over K until the end: reducing inside the loop would need shuffles.
    z_acc = tl.zeros((BLOCK_N, BLOCK_H) if ONE else (BLOCK_M, BLOCK_N), tl.float32)
    h_acc = tl.zeros((BLOCK_R, BLOCK_K) if ONE else (BLOCK_M, BLOCK_R), tl.float32)
    sigma_acc = tl.zeros((1, BLOCK_K) if ONE else (BLOCK_M,), tl.float32)
    byte, absmax = _runs(codes, n, 0, N, HALF, BLOCK_H)
    for j0 in range(0, HALF, BLOCK_H):
        next_byte, next_absmax = _runs(codes, n, j0 + BLOCK_H, N, HALF, BLOCK_H)
        if ONE:
            word = tl.load(x_pairs + j0 + j, mask=j0 + j < HALF, other=0)
        else:
            columns = j0 + j
            word = tile.read(Matrix(x_pairs, x.row // 2, 1), m, columns, M, HALF)
        even, odd = _split_pair(word, DTYPE)
        if SUMS or b_down is not None:
            k = 2 * j0 + tl.arange(0, BLOCK_K)
            x_tile = tile.read(x, m, k, M, K)
            if SUMS:
                sigma_acc += x_tile.to(tl.float32) if ONE else tl.sum(x_tile.to(tl.float32), 1)
            if b_down is not None:
                if ONE:
                    h_acc += tile.read(b_down, r, k, R, K).to(tl.float32) * x_tile.to(tl.float32)
                else:
                    down = tile.read(tile.transposed(b_down), k, r, K, R).to(tile.dtype_of(NUMERICS.factor_name))
                    h_acc = tile.dot_thin(x_tile, down, h_acc, NUMERICS)
        of_byte = tl.broadcast_to(absmax[:, :, None], (BLOCK_N, BLOCK_H // _RUN, _RUN))
        of_byte = tl.reshape(of_byte, (BLOCK_N, BLOCK_H))
        number = byte.to(tl.int32)
        high = _nearest(_decode(number >> 4, codes.kind) * of_byte, DTYPE, UPCAST)
        low = _nearest(_decode(number & 15, codes.kind) * of_byte, DTYPE, UPCAST)
        if ONE:
            z_acc += high.to(tl.float32) * even.to(tl.float32)[None, :]
            z_acc += low.to(tl.float32) * odd.to(tl.float32)[None, :]
        else:
            z_acc = tile.dot_wide(even, high.T, z_acc, NUMERICS)
            z_acc = tile.dot_wide(odd, low.T, z_acc, NUMERICS)
        byte = next_byte
        absmax = next_absmax
    if ONE:
        y_tile = tl.sum(z_acc, 1)[None, :]
    else:
        y_tile = z_acc
    h_tile = None
    if b_down is not None:
        if ONE:
            h_tile = tl.sum(h_acc, 1)[None, :]
        else:
            h_tile = h_acc
        h_tile = _nearest(h_tile * scale, tile.dtype_of(NUMERICS.factor_name), UPCAST)
        if h is not None:
            if tl.program_id(0) == 0:
                tile.write(h, h_tile, m, r, M, R)
    elif h is not None:
        h_tile = tile.read(h, m, r, M, R).to(tile.dtype_of(NUMERICS.factor_name))
    row_sums = None
    if SUMS:
        # Added 0.0, so that the loop's sum has a single use: a pass of Triton 3.7 asserts that.
        row_sums = tl.sum(sigma_acc, 1) if ONE else sigma_acc + 0.0
        if sigma is not None:
            if tl.program_id(0) == 0:
                tl.store(sigma + m, row_sums, mask=m < M)
    y_tile = tile.add_terms(
        y_tile, terms, None, h_tile, row_sums, m, n, M, N, 0, R, 1, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_R
    )  # fmt: skip
    tile.write(y, _nearest(y_tile, y.ptr.dtype.element_ty, UPCAST), m, n, M, N)


@triton.jit
def _small_h_kernel(x, b_down, h, K, R, scale, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """h[m,r] = scale·Σₖ x[m,k]·B_down[r,k], one program per number, since latency counts here and not traffic."""
    m = (tl.program_id(0) // R).to(tl.int64)
    r = (tl.program_id(0) % R).to(tl.int64)
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        row = tile.read_vector(Vector(x.ptr + m * x.row, x.col), k, K)
        acc += row * tile.read_vector(Vector(b_down.ptr + r * b_down.row, b_down.col), k, K)
    value = _nearest(tl.sum(acc, 0) * scale, h.ptr.dtype.element_ty, UPCAST)
    tl.store(h.ptr + m * h.row + r * h.col, value)


DRAM_BYTES, L2_BYTES = 3.0e6, 5.5e6
"""Bytes per microsecond, measured on an H100. Only the ratio matters, which is similar on other cards."""

LAUNCH_US = 2.5
"""The time that one more dependent launch takes."""


@dataclass(frozen=True)
class Launches:
    """Launches that run one after the other."""

    steps: tuple[Launch, ...]

    def run(self) -> None:
        for step in self.steps:
            step.run()

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps))


def h_before(shape: Shape, cols: int) -> bool:
    """Whether a launch of its own for h is faster than computing h in every program (of `cols` rows of W).

    Estimated from bytes: W comes from memory, B_down from the L2 for every program, and both pass through the L2.
    """
    m, n, k, r = shape
    weight = n * k * 0.5625  # nibbles, and fp32 absmax in blocks of 64
    inside = max(weight / DRAM_BYTES, (weight + cdiv(n, cols) * r * k * 2) / L2_BYTES)
    alone = LAUNCH_US + m * r * k * 4 / L2_BYTES
    return inside > weight / DRAM_BYTES + alone


def small_m_launch(
    x: Tensor, weight: QuantizedWeight, y: Tensor, added: Terms = W_ALONE, *,
    b_down: Tensor | None = None, scale: float = 1.0, h: Tensor | None = None, sigma: Tensor | None = None, arch: str,
) -> Launch | Launches:  # fmt: skip
    """y = Z∘(1+a) + h·upᵀ + σ·bᵀ + bias∘(1+d) + e + wc with Z = x·Wᵀ, h = scale·x·b_downᵀ, σ = Σₖ xₖ.

    Accumulated in fp32 and rounded once, to nearest. One launch; two where `h_before` says so, and only with an `h`,
    since the first launch needs memory for it.

    Args:
        x: (M, K), for which `served.why_not` is None.
        weight: (N, K) in 4 bits; decoded in fp32, rounded to x's dtype.
        y: (M, N), any strides, written.
        added: the terms as tensors: a, b, shift.d, shift.e (N,) or (1,); shift.bias, shift.wc (N,); up (N, R)
            contiguous, with b_down.
        b_down: (R, K), any strides.
        scale: of h.
        h: (M, R) in x's dtype, in fp32 where a factor is, written where given (with b_down).
        sigma: (M,) fp32, written where given.
        arch: of the card, whose configuration is taken.

    Raises:
        ValueError: a call that is not served, with the reason; nothing is written.
    """
    m, k, n = rows(x), x.shape[1], weight.shape[0]
    r = 0 if b_down is None else b_down.shape[0]
    if (added.up is None) != (b_down is None):
        raise ValueError("up and b_down come together")
    if added.up is not None and not added.up.is_contiguous():
        raise ValueError(f"up must be contiguous, got strides {added.up.stride()}")
    if h is not None and b_down is None:
        raise ValueError("h is given, but no b_down to make it of")
    if reason := why_not("triton", x, weight, r):
        raise ValueError(f"the fused product of few tokens does not serve this call: {reason}")
    shape = Shape(configs.tokens(m), n, k, r)
    how = numerics(x.dtype, added.up, b_down)
    beside = Beside(arch, x.dtype, r, halves=halves(how), nested=weight.state.nested is not None, rows=shape.m)
    config = fitted("small_m", tables.choose("small_m", arch, x.dtype, shape), beside)
    before = h is not None and h_before(shape, config["cols"])
    x_rows = Matrix(x, x.stride(0) if shape.m > 1 else 0, 1)
    args = {
        "x": x_rows, "codes": codes(weight), "y": matrix(y), "b_down": None if before else matrix(b_down),
        "h": matrix(h), "sigma": sigma, "terms": terms_of(added),
        "M": m, "N": n, "K": k, "R": r, "scale": float(scale), "NUMERICS": how,
        "BLOCK_M": shape.m, "BLOCK_N": config["cols"], "BLOCK_K": config["depth"],
        "BLOCK_R": configs.block_r(r),
    }  # fmt: skip
    product = Launch(_small_m_kernel, (cdiv(n, config["cols"]),), args, options(config, args))
    if not before:
        return product
    low = {
        "x": x_rows, "b_down": matrix(b_down), "h": matrix(h), "K": k, "R": r, "scale": float(scale),
        "UPCAST": how.upcast, "BLOCK_K": 64 if arch == "cpu" else 1024,
    }  # fmt: skip
    return Launches((Launch(_small_h_kernel, (m * r,), low, {"num_warps": 4, "num_stages": 1}), product))
