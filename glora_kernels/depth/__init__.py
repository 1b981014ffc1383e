"""What is done to all layers of a model at once, one launch a kind of layer.

| kernel | file | computes, of every layer | used for |
|---|---|---|---|
| `_merge_kernel` | merge | W + W∘A + s·B, b + b∘d + e + W·c | merging |
| `_restore_kernel` | merge | W and b from their copies | taking it back |
| `_shift_kernel` | shift | b + b∘d + e + W·c | β, once for many calls (`shift_once`) |
| `_shift_grad_kernel`, `_shift_down_kernel` | shift | g∘(1+d), g∘b, Wᵀg and its factors' gradients | db, dd, de, dC |
| `_shared_grad_kernel` | shared | Σ s·Sᵀ·drop(x), Σ dyᵀh over layers | the gradients of shared factors |

They read layers from tables of addresses (`rows`).
"""
