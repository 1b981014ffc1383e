"""Operations on all layers of a model at once, in one launch for all layers of a kind (`depth.op`).

This folder has no `Operator`: `op` and `deferred` are its entry points, `triton` and `eager` serve them.

| kernel | file | computes, for every layer | used for |
|---|---|---|---|
| `_merge_kernel` | merge | W + W∘A + s·B, b + b∘d + e + W·c | merging |
| `_restore_kernel` | merge | W and b from their copies | unmerging |
| `_shift_kernel` | shift | b + b∘d + e + W·c | β, once for many calls (`shift_once`) |
| `_shift_grad_kernel`, `_shift_down_kernel` | shift | g∘(1+d), g∘b, Wᵀg and its factors' gradients | db, dd, de, dC |
| `_shared_grad_kernel` | shared | Σ s·Sᵀ·drop(x), Σ dyᵀh over layers | the gradients of shared factors |

The kernels read the addresses of the layers' tensors from tables (`rows`).
"""
