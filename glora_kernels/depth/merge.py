"""Merging all layers of a model in one launch, W ← W + W∘A + s·B, and unmerging them: W ← its copy."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.depth import rows
from glora_kernels.depth.table import GroupKey, PointerTable, aligned, pointer_table
from glora_kernels.operands import Matrix, Pair
from glora_kernels.runtime import configs, environment
from glora_kernels.runtime.launch import Launch, options, triton_dtype

_WORDS = {2: torch.int16, 4: torch.int32}
"""By size of a number in bytes: the integer type it is copied as."""


@triton.jit
def _merge_kernel(
    table_ptr,
    HAS_LOW_A: tl.constexpr, HAS_LOW_B: tl.constexpr, HAS_PRODUCT: tl.constexpr, HAS_C: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr, ADAPTER: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """W ← W + W∘A + s·B (or W + W·A + s·B) in place and β = b + b∘d + e + W·c, of every layer of a table.

    A program reads and overwrites its own rows of W; in the product variant it reads them twice, first for P = W·A_up.
    The sums are computed in fp32 in the order written here (the launch forbids fused multiply-adds) and rounded once.
    The HAS_ flags say what any layer of the table has; the forms of one layer are in its row.
    """
    row = table_ptr + tl.program_id(1).to(tl.int64) * rows.LAYER_WIDTH
    N = rows.size(row, "N", ALIGN if TRANSPOSED else 1)
    if tl.program_id(0) * BLOCK_N >= N:
        return
    K = rows.size(row, "K", ALIGN)
    weight = rows.weight(row, DTYPE, TRANSPOSED, ALIGN)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank_a, rank_b, rank_p = rows.size(row, "rank_a"), rows.size(row, "rank_b"), rows.size(row, "rank_p")
    a_up, a_down = rows.pointer(row, "a_up", ADAPTER), rows.pointer(row, "a_down", ADAPTER, ALIGN)
    b_up, b_down = rows.pointer(row, "b_up", ADAPTER), rows.pointer(row, "b_down", ADAPTER, ALIGN)
    a, b = rows.vector(row, "a", n, N, ADAPTER), rows.vector(row, "b", n, N, ADAPTER)
    has_a, has_b = (rows.number(row, "a") != 0) | (rank_a > 0), (rows.number(row, "b") != 0) | (rank_b > 0)
    scale = rows.real(row, "scale")
    if HAS_PRODUCT:
        r = tl.arange(0, BLOCK_P)
        p = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        if rank_p > 0:
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                w = tile.read(weight, n, k, N, K)
                up = tile.read(Matrix(a_up, rank_p, 1), k, r, K, rank_p)
                p = tile.exact_dot(w, up, p, PRECISION, UPCAST)
    if HAS_C:
        wc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        has_c = (rows.number(row, "c") != 0) | (rows.size(row, "rank_c") > 0)
    following = tile.read(weight, n, tl.arange(0, BLOCK_K), N, K)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = following.to(tl.float32)
        following = tile.read(weight, n, k + BLOCK_K, N, K)
        merged = w
        if HAS_C:
            if has_c:
                wc += w * rows.c_values(row, k, K, ADAPTER, BLOCK_R)[None, :]
        if has_a:
            term = tl.broadcast_to(a[:, None], (BLOCK_N, BLOCK_K))
            if HAS_LOW_A:
                pair = Pair(Matrix(a_up, rank_a, 1), Matrix(a_down, K, 1))
                term += tile.factor_product(pair, n, k, N, K, rank_a, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R)
            merged += w * term
        if HAS_PRODUCT:
            if rank_p > 0:
                down = tile.read(Matrix(a_down, K, 1), r, k, rank_p, K)
                merged += tile.exact_dot(p, down, tl.zeros((BLOCK_N, BLOCK_K), tl.float32), PRECISION, UPCAST)
        if has_b:
            term = tl.broadcast_to(b[:, None], (BLOCK_N, BLOCK_K))
            if HAS_LOW_B:
                pair = Pair(Matrix(b_up, rank_b, 1), Matrix(b_down, K, 1))
                low = tile.factor_product(pair, n, k, N, K, rank_b, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R)
                term += scale * low
            merged += term
        tile.write(weight, merged, n, k, N, K)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_C:
        total = tl.sum(wc, 1)
    rows.store_beta(row, n, N, total, ADAPTER, BIAS, BIAS)


def merge_launch(table: rows.LayerTable, *, arch: str) -> Launch:
    """W ← W + W∘A + s·B (W + W·A + s·B) in place and, to the column `beta`, b + b∘D + E + W·C of the old W."""
    key = table.key
    low_a, low_b = table.rank("A_down"), table.rank("B_down")
    product = table.rank("A_down", product=True)
    has_c = table.betas and table.has("C", "C_up")
    config = merge_config(arch, key, (low_a > 0) + (low_b > 0) + 2 * (product > 0) + has_c, table.align)
    args = {
        "table_ptr": table.pointers.entries,
        "HAS_LOW_A": low_a > 0, "HAS_LOW_B": low_b > 0, "HAS_PRODUCT": product > 0, "HAS_C": has_c,
        **rows.constants(table),
        "PRECISION": _merge_precision(arch, key.dtype), "UPCAST": environment.interpreting(),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(max(low_a, low_b), config["rank"]), "BLOCK_P": configs.block_r(product),
    }  # fmt: skip
    # A fused multiply-add would round W + W∘A once, where a product and a sum round twice.
    return Launch(_merge_kernel, rows.grid(table, config), args, options(config) | {"enable_fp_fusion": False})


def merge_config(arch: str, key: GroupKey, terms: int, align: int) -> dict[str, int]:
    """The tile of `rows.pass_config`, narrow where more than one of the `terms` that need registers is present.

    `rank`: the step in which a rank is walked: smaller in fp32, where products hold their operands in registers.
    """
    config = rows.pass_config(arch, key, narrow=terms > 1 or align == 1)
    warps = 4 if terms or arch == "cpu" else 8
    return config | {"rank": 16 if key.adapter == torch.float32 else 32, "num_warps": warps}


def _merge_precision(arch: str, dtype: torch.dtype) -> str:
    """How fp32 factors are multiplied: exactly for an fp32 weight.

    For a 16-bit weight by three TF32 products, where the card has them: they lose 2⁻²¹ of a term, a thousandth of a
    unit in the last place of the result. Exact fp32 products use no matrix instructions, and from rank 64 on would take
    longer than reading the memory (H100: 67 TFLOP/s, 3 TB/s).
    """
    return "tf32x3" if arch.startswith("sm_") and dtype != torch.float32 else "ieee"


@triton.jit
def _copy(row, TO: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr, WORD: tl.constexpr, ALIGN: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Copy block `program_id(0)` of one tensor; nothing beyond its end."""
    size = rows.number(row, COUNT, ALIGN)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < size:
        i = first + tl.arange(0, BLOCK)
        value = tl.load(rows.pointer(row, FROM, WORD, ALIGN) + i, mask=i < size)
        tl.store(rows.pointer(row, TO, WORD, ALIGN) + i, value, mask=i < size)


@triton.jit
def _restore_kernel(
    table_ptr,
    WORD: tl.constexpr, BIAS_WORD: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every layer's weight and bias back from their copies, as integers of their width: bit for bit."""
    row = table_ptr + tl.program_id(1).to(tl.int64) * rows.COPY_WIDTH
    _copy(row, "target", "source", "size", WORD, ALIGN, BLOCK)
    _copy(row, "bias_target", "bias_source", "bias_size", BIAS_WORD, 1, BLOCK)


def restore_table(copies: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> PointerTable:
    """The table of `restore_launch`: (weight, its copy, bias, its copy) of each layer, dense in the same strides."""
    layers = [
        {
            "target": w, "source": w_copy, "size": w.numel(),
            "bias_target": b, "bias_source": b_copy, "bias_size": 0 if b is None else b.numel(),
        }
        for w, w_copy, b, b_copy in copies
    ]  # fmt: skip
    return pointer_table(layers, rows.COPY_COLUMNS, copies[0][0].device)


def restore_launch(
    table: PointerTable, copies: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], *, arch: str
) -> Launch:
    """Every weight and bias overwritten with its copy, bit for bit; the copies may lie in pinned host memory."""
    ok = all(aligned(w, w_copy) and w.numel() % 16 == 0 for w, w_copy, _, _ in copies)
    width = copies[0][0].dtype.itemsize
    bias_width = next((b.dtype.itemsize for _, _, b, _ in copies if b is not None), width)
    config = restore_config(arch)
    args = {
        "table_ptr": table.entries,
        "WORD": triton_dtype(_WORDS[width]), "BIAS_WORD": triton_dtype(_WORDS[bias_width]),
        "ALIGN": 16 if ok else 1, "BLOCK": config["rows"],
    }  # fmt: skip
    blocks = max(cdiv(w.numel(), config["rows"]) for w, _, _, _ in copies)
    return Launch(_restore_kernel, (blocks, len(copies)), args, options(config))


def restore_config(arch: str) -> dict[str, int]:
    """`rows`: the elements that a program copies. Many loads in flight, since the copies may be in host memory."""
    return {"rows": 256 if arch == "cpu" else 4096, "num_warps": 4, "num_stages": 1}
