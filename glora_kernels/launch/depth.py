"""The launchers of the work over depth, one launch for all layers of a table. They allocate nothing.

Layers of one launch have one device, one dtype each of weights, adapters and biases, and one order of storage
(`group_key`); forms, ranks and sizes may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.depth import (
    COPY_COLUMNS,
    FACTOR_COLUMNS,
    LAYER_COLUMNS,
    PRODUCT_COLUMNS,
    _merge_kernel,
    _restore_kernel,
    _shared_grad_kernel,
    _shift_down_kernel,
    _shift_grad_kernel,
    _shift_kernel,
)
from glora_kernels.launch import configs
from glora_kernels.launch.plan import Launch, arithmetic, halves, numerics, options, triton_dtype, vector_stride
from glora_kernels.launch.table import GroupKey, Layer, PointerTable, SharedFactor, aligned, pointer_table
from glora_kernels.reference.random import dropout_threshold

_WORDS = {2: torch.int16, 4: torch.int32}
"""The integers in which numbers of that many bytes are copied."""


class LayerTable(NamedTuple):
    """A pointer table of layers, and what a launcher must know of them as a whole."""

    pointers: PointerTable
    key: GroupKey
    layers: tuple[Layer, ...]
    align: int
    betas: bool

    def has(self, *names: str) -> bool:
        return any(name in layer.adapter for layer in self.layers for name in names)

    def rank(self, down: str, product: bool = False) -> int:
        """The largest rank of a pair, by the name of its down factor; A's of the product variant, or of the others."""
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
        outputs: for each layer the column of a result (`kernels.depth.LAYER_COLUMNS`) → where it goes, contiguous.
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


def merge_launch(table: LayerTable, *, arch: str) -> Launch:
    """W ← W + W∘A + s·B (W + W·A + s·B) in place and, to the column `beta`, b + b∘D + E + W·C of the old W."""
    key = table.key
    low_a, low_b = table.rank("A_down"), table.rank("B_down")
    product = table.rank("A_down", product=True)
    has_c = table.betas and table.has("C", "C_up")
    config = merge_config(arch, key, (low_a > 0) + (low_b > 0) + 2 * (product > 0) + has_c, table.align)
    args = {
        "table_ptr": table.pointers.entries,
        "HAS_LOW_A": low_a > 0, "HAS_LOW_B": low_b > 0, "HAS_PRODUCT": product > 0, "HAS_C": has_c,
        **_common(table),
        "PRECISION": _merge_precision(arch, key.dtype), "UPCAST": arithmetic(key.dtype)["UPCAST"],
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(max(1, low_a, low_b), config["rank"]), "BLOCK_P": configs.block_r(max(1, product)),
    }  # fmt: skip
    # A fused multiply-add would round W + W∘A once where the literal sum rounds twice.
    return Launch(_merge_kernel, _grid(table, config), args, options(config) | {"enable_fp_fusion": False})


def restore_table(copies: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> PointerTable:
    """The table of `restore_launch`: (weight, its copy, bias, its copy) of each layer, dense in the same strides."""
    rows = [
        {
            "target": w, "source": w_copy, "size": w.numel(),
            "bias_target": b, "bias_source": b_copy, "bias_size": 0 if b is None else b.numel(),
        }
        for w, w_copy, b, b_copy in copies
    ]  # fmt: skip
    return pointer_table(rows, COPY_COLUMNS, copies[0][0].device)


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


def shift_launch(table: LayerTable, *, arch: str) -> Launch:
    """β = b + b∘D + E + W·C in fp32, to the column `beta`."""
    config = pass_config(arch, table.key, narrow=table.align == 1)
    args = {
        "table_ptr": table.pointers.entries, "HAS_C": table.has("C", "C_up"), **_common(table),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(max(1, table.rank("C_down")), 32),
    }  # fmt: skip
    return Launch(_shift_kernel, _grid(table, config), args, options(config))


def shift_grad_launch(table: LayerTable, *, arch: str) -> Launch:
    """The gradients of `shift_launch` from the column `g`, to the columns dbias, dc, dc_up, dc_wide, dd and de."""
    config = pass_config(arch, table.key, narrow=table.align == 1)
    args = {
        "table_ptr": table.pointers.entries, **_common(table),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(max(1, table.rank("C_down")), 32), "BLOCK_V": 32 if arch == "cpu" else 1024,
    }  # fmt: skip
    blocks = cdiv(table.cols, config["cols"]) if table.has("C", "C_up") else 0
    return Launch(_shift_grad_kernel, (blocks + 1, len(table.layers)), args, options(config))


def shift_down_launch(table: LayerTable, *, arch: str) -> Launch:
    """dC_down = C_upᵀ·dc from the column `dc_wide`, which `shift_grad_launch` has filled, to `dc_down`."""
    rank = table.rank("C_down")
    block_r = configs.block_r(rank, 32)
    args = {
        "table_ptr": table.pointers.entries, "ADAPTER": triton_dtype(table.key.adapter),
        "BLOCK_K": 32 if arch == "cpu" else 256, "BLOCK_R": block_r,
    }  # fmt: skip
    return Launch(_shift_down_kernel, (cdiv(rank, block_r), len(table.layers)), args,
                  {"num_warps": 8, "num_stages": 2})  # fmt: skip


def shared_grad_tables(factors: Sequence[SharedFactor]) -> tuple[PointerTable, PointerTable]:
    """The two tables of `shared_grad_launch`: the factors, and the products of all of them."""
    rows: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for out, parts in factors:
        rows.append({
            "first": len(products), "count": len(parts), "R": out.shape[0], "C": out.shape[1], "out": out,
            "stride_r": out.stride(0), "stride_c": out.stride(1),
        })  # fmt: skip
        for left, right, scale, p, seed in parts:
            on_device = seed is not None and seed.device.type != "cpu"
            products.append({
                "left": left, "left_stride_m": left.stride(0), "left_stride_r": left.stride(1),
                "right": right, "right_stride_m": right.stride(0), "M": left.shape[0], "scale": scale / (1.0 - p),
                "seed": None if seed is None or on_device else int(seed), "seed_address": seed if on_device else None,
                "threshold": dropout_threshold(p),
            })  # fmt: skip
    device = factors[0].out.device
    return pointer_table(rows, FACTOR_COLUMNS, device), pointer_table(products, PRODUCT_COLUMNS, device)


def shared_grad_launch(
    tables: tuple[PointerTable, PointerTable], factors: Sequence[SharedFactor], *, arch: str
) -> Launch:  # fmt: skip
    """out (R,C) = Σ_l scale_l·left_lᵀ·drop(right_l) of every factor."""
    parts = [part for factor in factors for part in factor.products]
    dtype = parts[0].right.dtype
    rank, width = max(f.out.shape[0] for f in factors), max(f.out.shape[1] for f in factors)
    how = numerics(dtype, parts[0].left)
    ok = all(
        aligned(part.right) and part.right.stride(0) % 16 == 0 and part.right.shape[1] % 16 == 0 for part in parts
    )  # fmt: skip
    config = shared_grad_config(arch, dtype, rank)
    drops = any(part.dropout_p > 0.0 for part in parts)
    config = configs.fitted("shared_grad", config, arch, dtype, rank, halves=halves(how), drops=drops, aligned=ok)
    args = {
        "factor_ptr": tables[0].entries, "product_ptr": tables[1].entries,
        "HAS_DROPOUT": drops, "ALIGN": 16 if ok else 1,
        "OUT": triton_dtype(factors[0].out.dtype), "NUMERICS": how,
        "BLOCK_R": config["rows"], "BLOCK_C": config["cols"], "BLOCK_M": config["depth"],
    }  # fmt: skip
    grid = (cdiv(width, config["cols"]), cdiv(rank, config["rows"]), len(factors))
    return Launch(_shared_grad_kernel, grid, args, options(config, args))


def merge_config(arch: str, key: GroupKey, terms: int, align: int) -> dict[str, int]:
    """A tile as in `pass_config`, a narrow one where there is more than one of the `terms` that take registers.

    `rank`: the most of a rank at a time; products in fp32 hold their operands in registers.
    """
    config = pass_config(arch, key, narrow=terms > 1 or align == 1)
    warps = 4 if terms or arch == "cpu" else 8
    return config | {"rank": 16 if key.adapter == torch.float32 else 32, "num_warps": warps}


def pass_config(arch: str, key: GroupKey, narrow: bool = False) -> dict[str, int]:
    """Rows n and columns k of a tile of W; the longer side lies along its contiguous dimension."""
    if arch == "cpu":
        return {"rows": 32, "cols": 32, "num_warps": 4, "num_stages": 1}
    short, long = 32, 128 >> (key.dtype == torch.float32) >> narrow
    rows, cols = (long, short) if key.transposed else (short, long)
    return {"rows": rows, "cols": cols, "num_warps": 4, "num_stages": 2}


def restore_config(arch: str) -> dict[str, int]:
    """Elements a program copies: many loads in flight, for memory as far away as the host's."""
    return {"rows": 256 if arch == "cpu" else 4096, "num_warps": 4, "num_stages": 1}


def shared_grad_config(arch: str, dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Rows of the rank, columns, and tokens at a time; `cols` is a multiple of 8, as the dropout mask wants."""
    if arch == "cpu":
        return {"rows": 16, "cols": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    rows = configs.block_r(rank, 64)
    if dtype == torch.float32:  # products on the ordinary units hold their operands in registers
        warps = 8 if rows > 16 and arch in configs.OLD else 4  # what does not spill
        return {"rows": rows, "cols": 32 if rows > 16 else 64, "depth": 32, "num_warps": warps, "num_stages": 2}
    return {"rows": rows, "cols": 64, "depth": 64, "num_warps": 4, "num_stages": 2 if arch.startswith("gfx") else 3}


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


def _common(table: LayerTable) -> dict[str, Any]:
    key = table.key
    return {
        "TRANSPOSED": key.transposed, "ALIGN": table.align, "DTYPE": triton_dtype(key.dtype),
        "ADAPTER": triton_dtype(key.adapter), "BIAS": triton_dtype(key.bias),
    }  # fmt: skip


def _grid(table: LayerTable, config: dict[str, int]) -> tuple[int, int]:
    return cdiv(table.rows, config["rows"]), len(table.layers)


def _merge_precision(arch: str, dtype: torch.dtype) -> str:
    """How factors in fp32 are multiplied: exactly into an fp32 weight.

    Into a 16-bit one by three TF32 products where there are such: what they lose, 2⁻²¹ of a term, is a thousandth of
    a unit in the last place of the result. Exact ones are no matrix instructions, and from rank 64 on would take longer
    than the memory (H100: 67 TFLOP/s, 3 TB/s).
    """
    return "tf32x3" if arch.startswith("sm_") and dtype != torch.float32 else "ieee"
