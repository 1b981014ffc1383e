"""The linear layers of experts as differentiable operations of PyTorch: see `glora.composite`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.dispatch.common import Weight, factor_dtype, wide_dtype, without_autocast
from glora_kernels.experts.call import Call, Terms
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.products import of_expert
from glora_kernels.glora.composite import dense_of, valued
from glora_kernels.glora.eager import dropped, mask_of


def expert_linear(
    x: Tensor, weight: Weight, groups: Groups, t: Terms, call: Call, h: Tensor | None, sigma: Tensor | None
) -> Tensor:
    """y (M, N); arguments as in `experts.eager.forward`. Where a forward saved h and σ, their values are used."""
    dtype, wide, narrow = x.dtype, wide_dtype(x.dtype), factor_dtype(x.dtype, (t.up, t.down))
    rows = groups.gather(x) if call.of_tokens else x
    kept = rows
    if call.dropout_p > 0.0:
        kept = dropped(x, mask_of(call.dropout_p, t.seed, x.shape[0], x.shape[1], x.device))
        kept = groups.gather(kept) if call.of_tokens else kept
    found, n = [], 0
    with without_autocast(x.device.type):
        for e, span in enumerate(groups.spans()):
            w = dense_of(of_expert(weight, e, groups.experts), dtype)
            y, n = linear(rows[span], w).to(wide), len(w)
            if t.a is not None:
                y = y * (1 + t.a[e].to(wide))
            if t.up is not None and t.down is not None:
                own = linear(kept[span].to(narrow), t.down[e].to(narrow)) * call.low_scale
                y = y + linear(valued(own, None if h is None else h[span]), t.up[e].to(narrow))
            if t.b is not None:
                own = rows[span].sum(-1, keepdim=True, dtype=wide)
                y = y + valued(own, None if sigma is None else sigma[span]) * t.b[e].to(wide)
            if t.beta is not None:
                y = y + t.beta[e].to(wide)
            found.append(y.to(dtype))
        found.append(rows.new_zeros(len(rows) - sum(map(len, found)), n))
        y = torch.cat(found)
    if call.is_sorted or groups.order is None:
        return y
    return torch.zeros_like(y).index_copy(0, groups.order, y)
