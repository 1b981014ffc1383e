"""The launchers of the end of a backward: partial sums become gradients. They allocate nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.finish import _finish_kernel, _totals_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import Launch, arithmetic, leading_stride, options, strides, vector_stride


class Sum(NamedTuple):
    """One sum for `finish_launch`: out (I,J), of any strides, = Σ part (splits,I,J), contiguous in (I,J)."""

    part: Tensor
    out: Tensor


def finish_launch(
    *,
    part: Tensor | None = None,
    factor: Tensor | None = None,
    p: int = 0,
    r: int = 0,
    with_g: bool = False,
    mixed: bool = False,
    outputs: dict[str, Tensor],
    a: Tensor | None = None,
    bias: Tensor | None = None,
    d: Tensor | None = None,
    dy: Tensor | None = None,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    sums: tuple[Sum, ...] = (),
    device_of: Tensor,
    arch: str,
) -> Launch:
    """The gradients named in `outputs` (du, db_up, da, db, dbias, dwc, dd, de), and up to two `sums`.

    factor (splits,p+r,N) is dyᵀ[P|h]; part (splits,·,N) holds Σ dy (`with_g`), dyᵀσ where db is asked for, and the
    sums for dA, one or, where `mixed`, three (`sums.dy_launch`). dA needs a, dy, x and W as well.
    """
    if len(sums) > 2:
        raise ValueError(f"a launch takes up to two sums, got {len(sums)}")
    n = next((t.shape[2] for t in (part, factor) if t is not None), 0)
    k = 0 if x is None else x.shape[1]
    m = 0 if dy is None else dy.shape[0]
    config = tables.choose("finish", arch, device_of.dtype, Shape(m, n, k, r))
    rows, cols = config["rows"], config["cols"]
    column_programs = cdiv(n, cols) if outputs else 0
    first, second = (*sums, None, None)[:2]

    def tiles(item: Sum | None) -> int:
        return 0 if item is None else cdiv(item.out.shape[0], rows) * cdiv(item.out.shape[1], cols)

    segments: dict[str, object] = {}
    for name, item in (("first", first), ("second", second)):
        i, j = (0, 0) if item is None else item.out.shape
        segments |= {
            f"{name}_part_ptr": None if item is None else item.part,
            f"stride_{name}": 0 if item is None else item.part.stride(0),
            f"{name}_out_ptr": None if item is None else item.out,
            **strides(None if item is None else item.out, f"stride_{name}_i", f"stride_{name}_j"),
            f"{name}_splits": 0 if item is None else item.part.shape[0],
            f"{name.upper()}_I": i, f"{name.upper()}_J": j, f"HAS_{name.upper()}": item is not None,
        }  # fmt: skip
    gradients = ("du", "db_up", "da", "db", "dbias", "dwc", "dd", "de")
    args = {
        "part_ptr": part,
        "stride_part": leading_stride(part), "stride_pc": 0 if part is None else part.stride(1),
        "factor_ptr": factor,
        "stride_factor_part": leading_stride(factor),
        "stride_factor_c": 0 if factor is None else factor.stride(1),
        **{f"{name}_ptr": outputs.get(name) for name in gradients},
        "a_ptr": a, "stride_a": vector_stride(a),
        "bias_ptr": bias, "stride_bias": leading_stride(bias),
        "d_ptr": d, "stride_d": vector_stride(d),
        "dy_ptr": dy, **strides(dy, "stride_dym", "stride_dyn"),
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        **segments,
        "M": m, "N": n, "K": k, "P": p, "R": r,
        "splits": 0 if part is None else part.shape[0],
        "factor_splits": 0 if factor is None else factor.shape[0],
        "column_programs": column_programs, "first_programs": tiles(first),
        "HAS_COLUMNS": column_programs > 0, "HAS_FACTOR": factor is not None, "HAS_G": with_g,
        **{f"HAS_{name.upper()}": name in outputs for name in gradients},
        "HAS_D": d is not None, "MIXED": mixed,
        **arithmetic(device_of.dtype),
        "BLOCK_N": cols, "BLOCK_C": configs.block_r(max(1, p + r), 64), "BLOCK_I": rows,
        "BLOCK_M": config["tokens"], "BLOCK_K": config["depth"],
    }  # fmt: skip
    return Launch(_finish_kernel, (column_programs + tiles(first) + tiles(second),), args, options(config))


def totals_launch(vectors: Tensor, out: Tensor) -> Launch:
    """out (I,) = Σₙ vectors (I,N) in fp32: the gradients of constants."""
    args = {"vectors_ptr": vectors, "out_ptr": out, "N": vectors.shape[1], "BLOCK_N": 1024}
    return Launch(_totals_kernel, (vectors.shape[0],), args, {"num_warps": 4, "num_stages": 1})
