"""The path of the Triton kernels: allocates results and partial sums, and launches. Same signatures as `ops.eager`.

The kernels are imported at the first call, so that importing the package touches no GPU and needs no triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glora_kernels.launch import environment
from glora_kernels.launch.plan import arch_of
from glora_kernels.launch.workspace import workspace_like
from glora_kernels.ops import recover
from glora_kernels.ops.common import Call, Needs, Supports, given, wide_dtype

if TYPE_CHECKING:
    from glora_kernels.launch import glora as launch
else:

    class _Lazy:
        def __getattr__(self, name: str) -> object:
            environment.require_triton()
            from glora_kernels.launch import glora

            globals()["launch"] = glora
            return getattr(glora, name)

    launch = _Lazy()


def forward(
    x: Tensor, weight: Tensor, beta: Tensor | None, s: Supports, call: Call
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y (M,N), and what backward may want: h (M,·) = [P | s·x̃·B_downᵀ], σ (M,), U (N,R). See `ops.eager.forward`."""
    arch = arch_of(x)
    m, n = x.shape[0], weight.shape[0]
    product_rank, rank = _ranks(s, call)
    h = x.new_empty(m, rank) if rank else None
    sigma = x.new_empty(m, dtype=torch.float32) if s.b is not None else None
    u = x.new_empty(n, product_rank) if product_rank else None
    if h is not None and u is not None and s.a_up is not None:
        launch.project_launch(weight, v=s.a_up.t(), out=u, row_sum=None, row_weight=None, arch=arch).run()
        p = h[:, :product_rank]
        launch.project_launch(x, v=s.a_down, out=p, row_sum=sigma, row_weight=None, arch=arch).run()
    if h is not None and s.b_down is not None:
        launch.project_launch(
            x, v=s.b_down, out=h[:, product_rank:], row_sum=None, row_weight=None, scale=call.scale,
            dropout_p=call.dropout_p, seed=call.seed, arch=arch,
        ).run()  # fmt: skip
    if sigma is not None and not product_rank:
        launch.project_launch(x, v=None, out=None, row_sum=sigma, row_weight=None, arch=arch).run()
    y = x.new_empty(m, n)
    up = _beside(u, s.b_up, 1, x.dtype)
    effective = _weight_for(weight, s, call, x.dtype, arch)
    launch.glora_fwd_launch(x, effective, y, h=h, up=up, a=s.a, b=s.b, sigma=sigma, beta=beta, arch=arch).run()
    return y, h, sigma, u


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    beta: Tensor | None,
    s: Supports,
    y: Tensor | None,
    h: Tensor | None,
    sigma: Tensor | None,
    u: Tensor | None,
    call: Call,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`, in the order of `Needs`; None where not wanted. See `ops.eager.backward`."""
    arch = arch_of(dy)
    m, (n, k) = dy.shape[0], weight.shape
    product_rank, rank = _ranks(s, call)
    dx = da = da_up = da_down = db = db_up = db_down = None

    # S = [dy·U | s·dy·B_up] and τ = dy·b.
    ds = dy.new_empty(m, rank) if rank and (needs.x or needs.a_down or needs.b_down) else None
    tau = dy.new_empty(m, dtype=torch.float32) if s.b is not None and needs.x else None
    if ds is not None and u is not None:
        out = ds[:, :product_rank]
        launch.project_launch(dy, v=u.t(), out=out, row_sum=None, row_weight=None, arch=arch).run()
    if ds is not None and s.b_up is not None:
        launch.project_launch(
            dy,
            v=s.b_up.t(),
            out=ds[:, product_rank:],
            row_sum=None,
            row_weight=None,
            scale=call.scale,
            arch=arch,
        ).run()
    if tau is not None:
        launch.project_launch(dy, v=None, out=None, row_sum=tau, row_weight=s.b, arch=arch).run()

    # Everything that is summed over the rows of dy, in one read: [dyᵀP | dyᵀh], g, dyᵀσ, Σ dy∘y.
    if needs.a or needs.beta or needs.b or needs.b_up or (call.matmul and needs.a_up):
        wants_h = h is not None
        wants_sigma = sigma is not None and s.b is not None
        sums = _sums_over_rows(
            dy,
            h if wants_h else None,
            needs.beta or needs.a,
            sigma if wants_sigma else None,
            y if needs.a else None,
            arch,
        )
        columns = rank if wants_h else 0
        factors, extra = sums[:columns], list(sums[columns:])
        g = extra.pop(0) if needs.beta or needs.a else None
        dy_sigma = extra.pop(0) if wants_sigma else None
        if needs.b_up:
            db_up = factors[product_rank:].t()
        if needs.b and s.b is not None and dy_sigma is not None:
            db = dy_sigma.sum().view(1) if s.b.numel() == 1 else dy_sigma
        if call.matmul and needs.a_up:
            du = factors[:product_rank].t().to(dy.dtype)
            da_up = _sums_over_rows(weight, du, False, None, None, arch).t()
        if needs.a and s.a is not None:
            rest = recover.rest_of_gradient(g, beta, factors.t() if s.b_up is not None else None, dy_sigma, s)
            exact = recover.ill_conditioned_rows(given(y), beta, h, sigma, s, x_is_kept=True).contiguous()
            part = dy.new_empty(launch.hadamard_grad_tiles(n, k, dy.dtype, arch)[1], n, 1, dtype=torch.float32)
            marked = exact.view(torch.int8)
            launch.hadamard_grad_launch(dy, given(x), weight, dup=part, marked=marked, arch=arch).run()
            da = recover.gradient(extra.pop(0), rest, exact, part.sum((0, 2)), s.a)
        beta_grad = g if needs.beta else None
    else:
        beta_grad = None

    if needs.b_down:
        s_b = given(ds)[:, product_rank:]
        db_down = _sums_over_rows(given(x), s_b, False, None, None, arch, call.dropout_p, call.seed)
    if call.matmul and needs.a_down:
        da_down = _sums_over_rows(given(x), given(ds)[:, :product_rank], False, None, None, arch)

    if needs.x:
        dx = dy.new_empty(m, k)
        down = _beside(s.a_down if call.matmul else None, s.b_down, 0, dy.dtype)
        effective = _weight_for(weight, s, call, dy.dtype, arch)
        launch.glora_dx_launch(
            dy, effective, dx, s=ds, down=down, free_rank=product_rank, a=s.a, tau=tau,
            dropout_p=call.dropout_p if s.b_down is not None else 0.0, seed=call.seed, arch=arch,
        ).run()  # fmt: skip
    if not call.matmul and (needs.a_up or needs.a_down) and s.a_up is not None:
        n_tiles, k_tiles = launch.hadamard_grad_tiles(n, k, dy.dtype, arch)
        r = s.a_up.shape[1]
        dup = dy.new_empty(k_tiles, n, r, dtype=torch.float32) if needs.a_up else None
        ddown = dy.new_empty(n_tiles, r, k, dtype=torch.float32) if needs.a_down else None
        launch.hadamard_grad_launch(
            dy, given(x), weight, a_up=s.a_up, a_down=s.a_down, dup=dup, ddown=ddown, arch=arch
        ).run()
        da_up = None if dup is None else dup.sum(0)
        da_down = None if ddown is None else ddown.sum(0)
    return dx, beta_grad, da, da_up, da_down, db, db_up, db_down


def beta_forward(weight: Tensor, bias: Tensor | None, c: Tensor | None, d: Tensor | None, e: Tensor | None) -> Tensor:
    """β = b∘(1+d) + e + W·c, (N,)."""
    beta = weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))
    launch.beta_launch(weight, bias, c, d, e, beta, arch=arch_of(weight)).run()
    return beta


def beta_backward_c(g: Tensor, weight: Tensor, c: Tensor) -> Tensor:
    """dc = Wᵀg, (K,)."""
    dc = torch.empty_like(c, memory_format=torch.contiguous_format)
    launch.project_launch(
        weight.t(), v=None, out=None, row_sum=dc, row_weight=g.contiguous(), arch=arch_of(weight)
    ).run()
    return dc


def _ranks(s: Supports, call: Call) -> tuple[int, int]:
    """(columns of h of the product variant's pair, columns in all)."""
    product_rank = s.a_up.shape[1] if call.matmul and s.a_up is not None else 0
    return product_rank, product_rank + (0 if s.b_up is None else s.b_up.shape[1])


def _beside(first: Tensor | None, second: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor | None:
    """The factors of both low-rank pairs as one; a lone one as it is (the kernels cast what they load)."""
    if first is None or second is None:
        return second if first is None else first
    return torch.cat([first.to(dtype), second.to(dtype)], dim)


def _weight_for(weight: Tensor, s: Supports, call: Call, dtype: torch.dtype, arch: str) -> Tensor:
    """W itself (the kernels cast it under autocast), or W_eff built in the workspace where A is lora."""
    if call.matmul or s.a_up is None or s.a_down is None:
        return weight
    effective = workspace_like(weight, dtype)
    launch.weff_launch(weight, s.a_up, s.a_down, effective, arch=arch).run()
    return effective


def _sums_over_rows(
    x: Tensor,
    s: Tensor | None,
    with_sum: bool,
    sigma: Tensor | None,
    y: Tensor | None,
    arch: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """(C, J) in fp32: Sᵀ·drop(X), then Σ X, σᵀX, Σ X∘Y as far as given. Partial sums are added in a fixed order."""
    m, j = x.shape
    rank = 0 if s is None else s.shape[1]
    rows = rank + with_sum + (sigma is not None) + (y is not None)
    splits = launch.factor_grad_splits(m, j, rank, x.dtype, arch)
    part = x.new_empty(splits, rows, j, dtype=torch.float32)
    launch.factor_grad_launch(
        x, part, s=s, with_sum=with_sum, sigma=sigma, y=y, dropout_p=dropout_p, seed=seed, arch=arch
    ).run()
    return part[0] if splits == 1 else part.sum(0)
