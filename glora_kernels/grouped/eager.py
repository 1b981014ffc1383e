"""A group of LoRA layers in plain PyTorch: each distinct h is computed once; a shared tensor gets one summed gradient.

With h_t = s_t·x̃_t·down_tᵀ for each distinct path t = (x, down, seed, s) and t(i) the path of member i:

    y_i = x_i·W_iᵀ + h_t(i)·up_iᵀ + bias_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from glora_kernels.dispatch.common import cast, wide_dtype
from glora_kernels.glora.chunks import gathered, spread, thin
from glora_kernels.glora.eager import AddedTerms, cast_weight, dropped, mask_of, scaled, with_terms
from glora_kernels.grouped.group import ABSENT, Group, Operands, Trained, add, factor_dtype


def forward(operands: Operands, group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """(y_i (M,N) of every member, h_t (M,R) of every path)."""
    hs, narrow = [], factor_dtype(operands)
    for path in group.paths():
        x, down = operands.xs[path.x], operands.downs[path.down]
        keep = _keep(len(x), down.shape[1], operands, group, path.seed)
        h = thin(dropped(x, keep), cast(down, narrow), x.dtype)
        hs.append(scaled(h, path.scale / (1.0 - group.dropout_p)))
    ys = []
    for i, t in enumerate(group.path_of()):
        x, weight = operands.xs[group.x[i]], operands.weights[group.weight[i]]
        bias = None if group.bias[i] == ABSENT else operands.biases[group.bias[i]]
        if bias is not None and bias.dtype != x.dtype:
            bias = cast(bias, wide_dtype(x.dtype))
        low = up = None
        if t != ABSENT:
            low, up = hs[t], cast(operands.ups[group.up[i]], narrow)
        ys.append(with_terms(x, cast_weight(weight, x.dtype), AddedTerms(bias, low, up)))
    return ys, hs


def backward(dys: list[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: Trained) -> Trained:
    """The gradients of the distinct tensors: each the sum over the members that use it.

    With S_t = s_t·Σ_i dy_i·up_i over the members of path t: dx = Σ_i dy_i·W_i + Σ_t mask_t∘(S_t·down_t)/(1-p),
    d_down = Σ_t S_tᵀ·x̃_t, d_up = Σ_i dy_iᵀ·h_t(i), d_bias = Σ_i Σ_m dy_i.
    """
    grads = needs.without()
    paths, path_of = group.paths(), group.path_of()
    dtype, wide, narrow = dys[0].dtype, wide_dtype(dys[0].dtype), factor_dtype(operands)
    sums: list[Tensor | None] = [None] * len(paths)
    for i, dy in enumerate(dys):
        t = path_of[i]
        if (bias_of := group.bias[i]) != ABSENT and needs.biases[bias_of]:
            add(grads.biases, bias_of, dy.sum(0, dtype=wide))
        if t == ABSENT:
            continue
        if needs.ups[group.up[i]]:
            add(grads.ups, group.up[i], gathered(hs[t], dy, dtype).t().to(wide))
        if needs.xs[group.x[i]] or needs.downs[group.down[i]]:
            scale = group.scales[i] / (1.0 - group.dropout_p)
            add(sums, t, scaled(thin(dy, cast(operands.ups[group.up[i]], narrow).t(), dtype), scale).to(wide))
    for path, total in zip(paths, sums, strict=True):
        if total is None:
            continue
        s, down = total.to(narrow), cast(operands.downs[path.down], narrow)
        keep = _keep(len(s), down.shape[1], operands, group, path.seed)
        if needs.downs[path.down]:
            add(grads.downs, path.down, gathered(s, dropped(operands.xs[path.x], keep), dtype).to(wide))
        if needs.xs[path.x]:
            add(grads.xs, path.x, dropped(spread(s, down, dtype), keep))
    # The small terms of dx come first, and the large product accumulates onto them, as in forward.
    for i, dy in enumerate(dys):
        if needs.xs[group.x[i]]:
            _add_product(grads.xs, group.x[i], dy, cast_weight(operands.weights[group.weight[i]], dtype))
    return grads


def _keep(rows: int, cols: int, operands: Operands, group: Group, seed_of: int) -> Tensor | None:
    seed = None if seed_of == ABSENT else operands.seeds[seed_of]
    return mask_of(group.dropout_p, seed, rows, cols, operands.xs[0].device)


def _add_product(totals: list[Tensor | None], index: int, left: Tensor, right: Tensor) -> None:
    known = totals[index]
    totals[index] = left @ right if known is None else torch.addmm(known, left, right, out=known)
