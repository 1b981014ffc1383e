"""Layers as rows of a table of 64-bit integers on the device: addresses (0: absent), sizes, strides, bits of fp32.

A launch has as many programs per layer as the largest layer needs; those beyond the end of a smaller layer return at
once. Every number is written by one program: no atomics, no flags. The layers of one launch have one device, one dtype
each for weights, adapters and biases, and one order of storage (`depth.table.group_key`); the forms of their supports,
ranks and sizes may differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.depth.table import GroupKey, Layer, PointerTable, aligned, pointer_table
from glora_kernels.operands import Matrix
from glora_kernels.runtime.launch import triton_dtype, vector_stride

LAYER_COLUMNS = (
    "weight", "stride", "N", "K", "scale", "rank_a", "rank_b", "rank_c", "rank_p",
    "a", "a_stride", "b", "b_stride", "bias", "bias_stride", "c", "c_stride", "d", "d_stride", "e", "e_stride",
    "a_up", "a_down", "b_up", "b_down", "c_up", "c_down",
    "beta", "g", "dbias", "dc", "dc_up", "dc_down", "dc_wide", "dd", "de",
)  # fmt: skip
"""One layer. rank_p replaces rank_a in the product variant. After each vector comes its stride, 0 for a constant.

beta: memory for the full bias. g: ∂β, fp32. d…: memory for the gradients; dc_wide: dc in fp32, for dC_down.
"""


COPY_COLUMNS = ("target", "source", "size", "bias_target", "bias_source", "bias_size")
"""One layer to restore: two copies from `source` to `target`, sizes in elements."""

FACTOR_COLUMNS = ("first", "count", "R", "C", "out", "stride_r", "stride_c")
"""One shared factor: its (R, C) gradient, and its rows first … first+count of the table of products."""

PRODUCT_COLUMNS = (
    "left", "left_stride_m", "left_stride_r", "right", "right_stride_m", "M", "part_scale", "seed", "seed_address",
    "threshold",
)  # fmt: skip
"""One layer's part of a shared factor's gradient: part_scale·leftᵀ·drop(right), left (M,R), right (M,C)."""

_TABLES = (LAYER_COLUMNS, COPY_COLUMNS, FACTOR_COLUMNS, PRODUCT_COLUMNS)
LAYER_WIDTH, COPY_WIDTH, FACTOR_WIDTH, PRODUCT_WIDTH = (tl.constexpr(len(table)) for table in _TABLES)
_PLACES = {name: place for table in _TABLES for place, name in enumerate(table)}
"""The index of each column in its table; no two tables share a name."""


@triton.constexpr_function
def _place(column):
    return _PLACES[column]


@triton.jit
def number(row, COLUMN: tl.constexpr, ALIGN: tl.constexpr = 1):
    """A 64-bit entry. ALIGN tells the compiler a divisor of it, which it cannot know of a value from memory."""
    return tl.multiple_of(tl.load(row + _place(COLUMN)), ALIGN)


@triton.jit
def size(row, COLUMN: tl.constexpr, ALIGN: tl.constexpr = 1):
    """A 32-bit entry, with ALIGN as in `number`."""
    return tl.multiple_of(tl.load(row + _place(COLUMN)).to(tl.int32), ALIGN)


@triton.jit
def real(row, COLUMN: tl.constexpr):
    """The fp32 number whose bits are stored in an entry."""
    return tl.load(row + _place(COLUMN)).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr = 1):
    return tl.multiple_of(tl.load(row + _place(COLUMN)).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def weight(row, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr):
    """W (N,K) of a layer, stored (N,K), or (K,N) if TRANSPOSED; one of its strides is known to be 1."""
    ptr = pointer(row, "weight", DTYPE, ALIGN)
    stride = number(row, "stride", ALIGN)
    if TRANSPOSED:
        return Matrix(ptr, 1, stride)
    else:
        return Matrix(ptr, stride, 1)


@triton.jit
def vector(row, COLUMN: tl.constexpr, index, size, DTYPE: tl.constexpr):
    """A vector or constant at `index`, in fp32; zeros outside, and if it is absent."""
    address = tl.load(row + _place(COLUMN))
    offsets = index.to(tl.int64) * tl.load(row + _place(COLUMN) + 1)
    mask = (index < size) & (address != 0)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(row, COLUMN: tl.constexpr, value, index, size, DTYPE: tl.constexpr):
    """Store a vector at the address in a column; nothing if that is 0."""
    address = tl.load(row + _place(COLUMN))
    mask = (index < size) & (address != 0)
    tl.store(address.to(tl.pointer_type(DTYPE)) + index.to(tl.int64), value.to(DTYPE), mask=mask)


@triton.jit
def put_sum(row, COLUMN: tl.constexpr, value, DTYPE: tl.constexpr):
    """Store the gradient of a constant at the address in a column; nothing if that is 0."""
    address = tl.load(row + _place(COLUMN))
    if address != 0:
        tl.store(address.to(tl.pointer_type(DTYPE)), value.to(DTYPE))


@triton.jit
def c_values(row, k, K, ADAPTER: tl.constexpr, BLOCK_R: tl.constexpr):
    """c[k] in fp32: the vector c, or Σᵣ C_up[k,r]·C_down[r]; zeros where there is no C."""
    c = vector(row, "c", k, K, ADAPTER)
    rank = size(row, "rank_c")
    up_ptr, down_ptr = pointer(row, "c_up", ADAPTER), pointer(row, "c_down", ADAPTER)
    for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        down = tl.load(down_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
        c += tl.sum(tile.read(Matrix(up_ptr, rank, 1), k, r, K, rank).to(tl.float32) * down[None, :], 1)
    return c


@triton.jit
def store_beta(row, n, N, wc, ADAPTER: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr):
    """Store β[n] = b + b∘d + e + wc at the address in the column `beta`."""
    beta = vector(row, "bias", n, N, BIAS)
    beta += beta * vector(row, "d", n, N, ADAPTER)
    beta += vector(row, "e", n, N, ADAPTER)
    put(row, "beta", beta + wc, n, N, OUT)


class LayerTable(NamedTuple):
    """A pointer table of layers, and what a launcher needs to know of all of them together."""

    pointers: PointerTable
    key: GroupKey
    layers: tuple[Layer, ...]
    align: int
    betas: bool

    def has(self, *names: str) -> bool:
        return any(name in layer.adapter for layer in self.layers for name in names)

    def rank(self, down: str, product: bool = False) -> int:
        """The largest rank of a pair, named by its down factor; of A_down only layers with the same `product` count."""
        ranks = (
            layer.adapter[down].shape[0]
            for layer in self.layers
            if down in layer.adapter and (layer.product == product or down != "A_down")
        )
        return max(ranks, default=0)

    @property
    def rows(self) -> int:
        return max(layer.dense.shape[0] for layer in self.layers)

    @property
    def cols(self) -> int:
        return max(layer.dense.shape[1] for layer in self.layers)


def layer_table(
    layers: Sequence[Layer], key: GroupKey, outputs: Sequence[Mapping[str, Tensor | None]]
) -> LayerTable:  # fmt: skip
    """The table of layers that all have this key.

    Args:
        layers: at least one.
        key: their `group_key`. Adapters of several dtypes are copied in fp32, non-contiguous factors contiguously.
        outputs: for each layer, column of a result (`LAYER_COLUMNS`) → memory for it, contiguous.
    """
    plain = tuple(layer._replace(adapter={k: _plain(t, key) for k, t in layer.adapter.items()}) for layer in layers)
    rows = [_row(layer, key) | dict(extra) for layer, extra in zip(plain, outputs, strict=True)]
    ok = all(
        aligned(layer.dense, layer.adapter.get("A_down"), layer.adapter.get("B_down"))
        and row["stride"] % 16 == 0
        and layer.dense.shape[1] % 16 == 0
        and (not key.transposed or layer.dense.shape[0] % 16 == 0)
        for layer, row in zip(plain, rows, strict=True)
    )
    betas = any(extra.get("beta") is not None for extra in outputs)
    table = pointer_table(rows, LAYER_COLUMNS, key.device)
    return LayerTable(table, key, plain, 16 if ok else 1, betas)


def pass_config(arch: str, key: GroupKey, narrow: bool = False) -> dict[str, int]:
    """Rows n and columns k of a tile of W; the longer side lies along its contiguous dimension."""
    if arch == "cpu":
        return {"rows": 32, "cols": 32, "num_warps": 4, "num_stages": 1}
    short, long = 32, 128 >> (key.dtype == torch.float32) >> narrow
    rows, cols = (long, short) if key.transposed else (short, long)
    return {"rows": rows, "cols": cols, "num_warps": 4, "num_stages": 2}


def _plain(tensor: Tensor, key: GroupKey) -> Tensor:
    tensor = tensor.detach().to(key.adapter)
    return tensor if tensor.ndim == 1 else tensor.contiguous()


def _row(layer: Layer, key: GroupKey) -> dict[str, Any]:
    get = layer.adapter.get
    rank_a, rank_b, rank_c = (0 if up is None else up.shape[1] for up in (get("A_up"), get("B_up"), get("C_up")))
    row: dict[str, Any] = {
        "weight": layer.dense.detach(), "stride": layer.dense.stride(1 if key.transposed else 0),
        "N": layer.dense.shape[0], "K": layer.dense.shape[1], "scale": float(layer.scale),
        "rank_a": 0 if layer.product else rank_a, "rank_b": rank_b, "rank_c": rank_c,
        "rank_p": rank_a if layer.product else 0,
        "bias": None if layer.bias is None else layer.bias.detach(), "bias_stride": 1,
    }  # fmt: skip
    for name in ("A", "B", "C", "D", "E"):
        row |= {name.lower(): get(name), f"{name.lower()}_stride": vector_stride(get(name))}
    return row | {name.lower(): get(name) for name in ("A_up", "A_down", "B_up", "B_down", "C_up", "C_down")}


def constants(table: LayerTable) -> dict[str, Any]:
    key = table.key
    return {
        "TRANSPOSED": key.transposed, "ALIGN": table.align, "DTYPE": triton_dtype(key.dtype),
        "ADAPTER": triton_dtype(key.adapter), "BIAS": triton_dtype(key.bias),
    }  # fmt: skip


def grid(table: LayerTable, config: dict[str, int]) -> tuple[int, int]:
    return cdiv(table.rows, config["rows"]), len(table.layers)
