"""The launchers: each turns tensors into one `Launch` of its kernel. They allocate nothing.

`arch` is chosen by the caller (`plan.arch_of`), so that a launch can be planned for a card that is not here.
"""

from __future__ import annotations

import triton
from torch import Tensor

from glora_kernels.kernels.glora import _glora_dx_kernel, _glora_fwd_kernel
from glora_kernels.kernels.low_rank import _factor_grad_kernel, _project_kernel
from glora_kernels.kernels.weight import _beta_kernel, _hadamard_grad_kernel, _weff_kernel
from glora_kernels.launch import configs
from glora_kernels.launch.plan import Launch, precision, strides, vector_stride
from glora_kernels.reference.random import dropout_threshold

GROUP = 8
"""Row tiles that share their columns in the L2 (`kernels.common._tile_of`)."""


def glora_fwd_launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    h: Tensor | None,
    up: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    sigma: Tensor | None,
    beta: Tensor | None,
    arch: str,
) -> Launch:
    """y (M,N) = (x·Wᵀ)∘(1+a) + h·upᵀ + σ·bᵀ + β."""
    (m, k), n = x.shape, weight.shape[0]
    rank = 0 if h is None else h.shape[1]
    config = configs.large_product(arch, x.dtype, m, weight.dtype)
    args = {
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        "y_ptr": y, **strides(y, "stride_ym", "stride_yn"),
        "h_ptr": h, **strides(h, "stride_hm", "stride_hr"),
        "up_ptr": up, **strides(up, "stride_un", "stride_ur"),
        "a_ptr": a, "stride_a": vector_stride(a),
        "b_ptr": b, "stride_b": vector_stride(b),
        "sigma_ptr": sigma,
        "beta_ptr": beta, "stride_beta": vector_stride(beta),
        "M": m, "N": n, "K": k, "R": rank,
        "HAS_A": a is not None, "HAS_B": b is not None, "HAS_BETA": beta is not None, "HAS_LOW_RANK": h is not None,
        **precision(x.dtype),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_K": config["depth"],
        "BLOCK_R": configs.block_r(max(1, rank)), "GROUP": GROUP,
    }  # fmt: skip
    grid = (triton.cdiv(m, config["rows"]) * triton.cdiv(n, config["cols"]),)
    return Launch(_glora_fwd_kernel, grid, args, _options(config))


def glora_dx_launch(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    *,
    s: Tensor | None,
    down: Tensor | None,
    free_rank: int,
    a: Tensor | None,
    tau: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    arch: str,
) -> Launch:
    """dx (M,K) = (dy∘(1+a))·W + S·down, masked from column `free_rank` of S on, + τ·1ᵀ."""
    (m, n), k = dy.shape, weight.shape[1]
    rank = 0 if s is None else s.shape[1]
    config = configs.large_product(arch, dy.dtype, m, weight.dtype)
    args = {
        "dy_ptr": dy, **strides(dy, "stride_dym", "stride_dyn"),
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        "dx_ptr": dx, **strides(dx, "stride_dxm", "stride_dxk"),
        "s_ptr": s, **strides(s, "stride_sm", "stride_sr"),
        "down_ptr": down, **strides(down, "stride_dr", "stride_dk"),
        "a_ptr": a, "stride_a": vector_stride(a),
        "tau_ptr": tau,
        "seed_ptr": seed,
        "M": m, "N": n, "K": k, "FREE_R": free_rank, "R": rank,
        **_dropout(dropout_p),
        "HAS_A": a is not None, "HAS_TAU": tau is not None, "HAS_FREE": free_rank > 0,
        "HAS_LOW_RANK": rank > free_rank, "HAS_DROPOUT": dropout_p > 0.0 and rank > free_rank,
        **precision(dy.dtype),
        "BLOCK_M": config["rows"], "BLOCK_N": config["depth"], "BLOCK_K": config["cols"],
        "BLOCK_R": configs.block_r(max(1, rank)), "GROUP": GROUP,
    }  # fmt: skip
    grid = (triton.cdiv(m, config["rows"]) * triton.cdiv(k, config["cols"]),)
    return Launch(_glora_dx_kernel, grid, args, _options(config))


def project_launch(
    x: Tensor,
    *,
    v: Tensor | None,
    out: Tensor | None,
    row_sum: Tensor | None,
    row_weight: Tensor | None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    arch: str,
) -> Launch:
    """out (M,R) = scale·drop(x)·Vᵀ for V (R,K), and row_sum (M,) = x·row_weight."""
    m, k = x.shape
    rank = 0 if v is None else v.shape[0]
    config = configs.project(arch, x.dtype)
    step = configs.block_r(max(1, rank))
    args = {
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "v_ptr": v, **strides(v, "stride_vr", "stride_vk"),
        "out_ptr": out, **strides(out, "stride_om", "stride_or"),
        "weight_ptr": row_weight, "stride_weight": vector_stride(row_weight),
        "sum_ptr": row_sum,
        "seed_ptr": seed,
        "M": m, "K": k, "R": rank,
        "scale": float(scale), **_dropout(dropout_p),
        "HAS_FACTOR": v is not None, "HAS_SUM": row_sum is not None, "HAS_WEIGHT": row_weight is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
        **precision(x.dtype),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"], "BLOCK_R": step,
    }  # fmt: skip
    grid = (triton.cdiv(m, config["rows"]), max(1, triton.cdiv(rank, step)))
    return Launch(_project_kernel, grid, args, _options(config))


def factor_grad_splits(rows: int, cols: int, rank: int, dtype: object, arch: str) -> int:
    """How many partial sums `factor_grad_launch` writes: the leading size of its `part`."""
    config = configs.factor_grad(arch, dtype)  # type: ignore[arg-type]
    step = configs.block_r(max(1, rank))
    programs = triton.cdiv(cols, config["cols"]) * max(1, triton.cdiv(rank, step))
    return configs.row_splits(rows, programs, config["rows"])


def factor_grad_launch(
    x: Tensor,
    part: Tensor,
    *,
    s: Tensor | None,
    with_sum: bool,
    sigma: Tensor | None,
    y: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    arch: str,
) -> Launch:
    """part (splits, C, J): Sᵀ·drop(X) in the first R rows, then Σ X, σᵀX and Σ X∘Y as far as asked for."""
    m, j = x.shape
    rank = 0 if s is None else s.shape[1]
    config = configs.factor_grad(arch, x.dtype)
    step = configs.block_r(max(1, rank))
    splits = part.shape[0]
    args = {
        "x_ptr": x, **strides(x, "stride_xm", "stride_xj"),
        "s_ptr": s, **strides(s, "stride_sm", "stride_sr"),
        "y_ptr": y, **strides(y, "stride_ym", "stride_yj"),
        "sigma_ptr": sigma,
        "part_ptr": part, **strides(part, "stride_part", "stride_pc", "stride_pj"),
        "seed_ptr": seed,
        "M": m, "J": j, "R": rank,
        "rows_per_split": triton.cdiv(triton.cdiv(m, splits), config["rows"]) * config["rows"],
        **_dropout(dropout_p),
        "HAS_FACTOR": s is not None, "HAS_SUM": with_sum, "HAS_SIGMA": sigma is not None, "HAS_Y": y is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
        **precision(x.dtype),
        "BLOCK_M": config["rows"], "BLOCK_J": config["cols"], "BLOCK_R": step,
    }  # fmt: skip
    grid = (triton.cdiv(j, config["cols"]), max(1, triton.cdiv(rank, step)), splits)
    return Launch(_factor_grad_kernel, grid, args, _options(config))


def weff_launch(weight: Tensor, a_up: Tensor, a_down: Tensor, out: Tensor, *, arch: str) -> Launch:
    """out (N,K) = W∘(1 + A_up·A_down)."""
    n, k = weight.shape
    config = configs.elementwise(arch)
    args = {
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        "up_ptr": a_up, **strides(a_up, "stride_un", "stride_ur"),
        "down_ptr": a_down, **strides(a_down, "stride_dr", "stride_dk"),
        "out_ptr": out, **strides(out, "stride_on", "stride_ok"),
        "N": n, "K": k, "R": a_up.shape[1],
        **precision(a_up.dtype),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(a_up.shape[1]),
    }  # fmt: skip
    grid = (triton.cdiv(n, config["rows"]), triton.cdiv(k, config["cols"]))
    return Launch(_weff_kernel, grid, args, _options(config))


def hadamard_grad_tiles(n: int, k: int, dtype: object, arch: str) -> tuple[int, int]:
    """How many partial sums `hadamard_grad_launch` writes: (n-tiles for ddown, k-tiles for dup)."""
    config = configs.hadamard_grad(arch, dtype)  # type: ignore[arg-type]
    return triton.cdiv(n, config["rows"]), triton.cdiv(k, config["cols"])


def hadamard_grad_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    a_up: Tensor | None = None,
    a_down: Tensor | None = None,
    dup: Tensor | None = None,
    ddown: Tensor | None = None,
    marked: Tensor | None = None,
    arch: str,
) -> Launch:
    """H = (dyᵀx)∘W reduced to dup (k-tiles,N,R) = H·A_downᵀ and ddown (n-tiles,R,K) = A_upᵀ·H.

    With `marked` (N,) int8: dup (k-tiles,N,1) = Σₖ H in the tiles with a marked row, undefined elsewhere.
    """
    (m, n), k = dy.shape, x.shape[1]
    rank = 1 if a_up is None else a_up.shape[1]
    config = configs.hadamard_grad(arch, x.dtype)
    args = {
        "dy_ptr": dy, **strides(dy, "stride_dym", "stride_dyn"),
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        "up_ptr": a_up, **strides(a_up, "stride_un", "stride_ur"),
        "down_ptr": a_down, **strides(a_down, "stride_dr", "stride_dk"),
        "dup_ptr": dup, **strides(dup, "stride_dup_part", "stride_dup_n", "stride_dup_r"),
        "ddown_ptr": ddown, **strides(ddown, "stride_ddown_part", "stride_ddown_r", "stride_ddown_k"),
        "marked_ptr": marked,
        "M": m, "N": n, "K": k, "R": rank,
        "HAS_DUP": dup is not None, "HAS_DDOWN": ddown is not None, "MARKED_ROWS": marked is not None,
        **precision(x.dtype),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_M": config["depth"],
        "BLOCK_R": configs.block_r(rank),
    }  # fmt: skip
    grid = (triton.cdiv(n, config["rows"]), triton.cdiv(k, config["cols"]))
    return Launch(_hadamard_grad_kernel, grid, args, _options(config))


def beta_launch(
    weight: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    e: Tensor | None,
    beta: Tensor,
    *,
    arch: str,
) -> Launch:
    """β (N,) = b∘(1+d) + e + W·c."""
    n, k = weight.shape
    config = configs.elementwise(arch)
    args = {
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        "bias_ptr": bias, "stride_bias": 0 if bias is None else bias.stride(0),
        "c_ptr": c, "stride_c": 0 if c is None else c.stride(0),
        "d_ptr": d, "stride_d": vector_stride(d),
        "e_ptr": e, "stride_e": vector_stride(e),
        "beta_ptr": beta, "N": n, "K": k,
        "HAS_BIAS": bias is not None, "HAS_C": c is not None, "HAS_D": d is not None, "HAS_E": e is not None,
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
    }  # fmt: skip
    return Launch(_beta_kernel, (triton.cdiv(n, config["rows"]),), args, _options(config))


def _options(config: dict[str, int]) -> dict[str, int]:
    return {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}


def _dropout(p: float) -> dict[str, float]:
    return {"threshold": dropout_threshold(p), "inv_keep": 1.0 / (1.0 - p)}
