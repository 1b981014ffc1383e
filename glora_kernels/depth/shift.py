"""β = b + b∘D + E + W·C of every layer of a model in one launch, and its gradients."""

import triton
import triton.language as tl
from triton import cdiv

from glora_kernels import tile
from glora_kernels.depth import rows
from glora_kernels.operands import Matrix
from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch, options, triton_dtype


@triton.jit
def _shift_kernel(
    table_ptr,
    HAS_C: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr, ADAPTER: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """β = b + b∘d + e + W·c in fp32, of every layer of a table; W is read only if a layer has a C."""
    row = table_ptr + tl.program_id(1).to(tl.int64) * rows.LAYER_WIDTH
    N = rows.size(row, "N", ALIGN if TRANSPOSED else 1)
    if tl.program_id(0) * BLOCK_N >= N:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_C:
        if (rows.number(row, "c") != 0) | (rows.size(row, "rank_c") > 0):
            K = rows.size(row, "K", ALIGN)
            weight = rows.weight(row, DTYPE, TRANSPOSED, ALIGN)
            wc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            following = tile.read(weight, n, tl.arange(0, BLOCK_K), N, K)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                w = following.to(tl.float32)
                following = tile.read(weight, n, k + BLOCK_K, N, K)
                wc += w * rows.c_values(row, k, K, ADAPTER, BLOCK_R)[None, :]
            total = tl.sum(wc, 1)
    rows.store_beta(row, n, N, total, ADAPTER, BIAS, tl.float32)


def shift_launch(table: rows.LayerTable, *, arch: str) -> Launch:
    """β = b + b∘D + E + W·C in fp32, to the column `beta`."""
    config = rows.pass_config(arch, table.key, narrow=table.align == 1)
    args = {
        "table_ptr": table.pointers.entries, "HAS_C": table.has("C", "C_up"), **rows.constants(table),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(table.rank("C_down"), 32),
    }  # fmt: skip
    return Launch(_shift_kernel, rows.grid(table, config), args, options(config))


@triton.jit
def _shift_grad_kernel(
    table_ptr,
    TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr, ADAPTER: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of `_shift_kernel` from g = ∂β, those whose address in the table is not 0.

    The first programs of a layer compute columns of dc[k] = Σₙ W[n,k]·g[n] and of dC_up[k,r] = dc[k]·C_down[r]; they
    store dc in fp32, since dC_down = C_upᵀ·dc needs all of it (`_shift_down_kernel`). One more program computes
    db = g∘(1+d), dd = g∘b and de = g, the last two summed for constants.
    """
    row = table_ptr + tl.program_id(1).to(tl.int64) * rows.LAYER_WIDTH
    N, K = rows.size(row, "N", ALIGN if TRANSPOSED else 1), rows.size(row, "K", ALIGN)
    g_ptr = rows.pointer(row, "g", tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    if (rows.number(row, "dc") | rows.number(row, "dc_up") | rows.number(row, "dc_wide")) == 0:
        blocks = 0
    i = tl.program_id(0)
    if i < blocks:
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = rows.weight(row, DTYPE, TRANSPOSED, ALIGN)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        following = tile.read(weight, tl.arange(0, BLOCK_N), k, N, K)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            w = following.to(tl.float32)
            following = tile.read(weight, n + BLOCK_N, k, N, K)
            acc += w * tl.load(g_ptr + n, mask=n < N, other=0.0)[:, None]
        dc = tl.sum(acc, 0)
        rows.put(row, "dc", dc, k, K, ADAPTER)
        rows.put(row, "dc_wide", dc, k, K, tl.float32)
        if rows.number(row, "dc_up") != 0:
            rank = rows.size(row, "rank_c")
            down_ptr, dc_up_ptr = rows.pointer(row, "c_down", ADAPTER), rows.pointer(row, "dc_up", ADAPTER)
            for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                down = tl.load(down_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
                tile.write(Matrix(dc_up_ptr, rank, 1), dc[:, None] * down[None, :], k, r, K, rank)
    elif i == blocks:
        d_sum = tl.zeros((BLOCK_V,), tl.float32)
        e_sum = tl.zeros((BLOCK_V,), tl.float32)
        d_is_vector, e_is_vector = rows.number(row, "d_stride") != 0, rows.number(row, "e_stride") != 0
        for n0 in range(0, N, BLOCK_V):
            n = n0 + tl.arange(0, BLOCK_V)
            g = tl.load(g_ptr + n, mask=n < N, other=0.0)
            rows.put(row, "dbias", g + g * rows.vector(row, "d", n, N, ADAPTER), n, N, BIAS)
            dd = g * rows.vector(row, "bias", n, N, BIAS)
            d_sum += dd
            e_sum += g
            if d_is_vector:
                rows.put(row, "dd", dd, n, N, ADAPTER)
            if e_is_vector:
                rows.put(row, "de", g, n, N, ADAPTER)
        if not d_is_vector:
            rows.put_sum(row, "dd", tl.sum(d_sum, 0), ADAPTER)
        if not e_is_vector:
            rows.put_sum(row, "de", tl.sum(e_sum, 0), ADAPTER)


def shift_grad_launch(table: rows.LayerTable, *, arch: str) -> Launch:
    """The gradients of `shift_launch` from the column `g`, to the columns dbias, dc, dc_up, dc_wide, dd and de."""
    config = rows.pass_config(arch, table.key, narrow=table.align == 1)
    args = {
        "table_ptr": table.pointers.entries, **rows.constants(table),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(table.rank("C_down"), 32), "BLOCK_V": 32 if arch == "cpu" else 1024,
    }  # fmt: skip
    blocks = cdiv(table.cols, config["cols"]) if table.has("C", "C_up") else 0
    return Launch(_shift_grad_kernel, (blocks + 1, len(table.layers)), args, options(config))


@triton.jit
def _shift_down_kernel(table_ptr, ADAPTER: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """dC_down[r] = Σₖ C_up[k,r]·dc[k] of every layer whose address for it is not 0."""
    row = table_ptr + tl.program_id(1).to(tl.int64) * rows.LAYER_WIDTH
    rank = rows.size(row, "rank_c")
    if (rows.number(row, "dc_down") == 0) | (tl.program_id(0) * BLOCK_R >= rank):
        return
    K = rows.size(row, "K")
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    up_ptr, dc_ptr = rows.pointer(row, "c_up", ADAPTER), rows.pointer(row, "dc_wide", tl.float32)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        dc = tl.load(dc_ptr + k, mask=k < K, other=0.0)
        acc += tile.read(Matrix(up_ptr, rank, 1), k, r, K, rank).to(tl.float32) * dc[:, None]
    rows.put(row, "dc_down", tl.sum(acc, 0), r, rank, ADAPTER)


def shift_down_launch(table: rows.LayerTable, *, arch: str) -> Launch:
    """dC_down = C_upᵀ·dc from the column `dc_wide`, which `shift_grad_launch` has filled, to `dc_down`."""
    rank = table.rank("C_down")
    block_r = configs.block_r(rank, 32)
    args = {
        "table_ptr": table.pointers.entries, "ADAPTER": triton_dtype(table.key.adapter),
        "BLOCK_K": 32 if arch == "cpu" else 256, "BLOCK_R": block_r,
    }  # fmt: skip
    return Launch(_shift_down_kernel, (cdiv(rank, block_r), len(table.layers)), args,
                  {"num_warps": 8, "num_stages": 2})  # fmt: skip
