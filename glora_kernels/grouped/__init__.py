"""Several LoRA layers, such as those that read one input, in one call: forward and backward take a few launches.

| kernel | file | computes, for every member or path | used for |
|---|---|---|---|
| `_grouped_down_kernel` | sums | s·drop(x)·downᵀ | h, where `_grouped_fwd_kernel` does not compute it |
| `_grouped_fwd_kernel` | product | x·Wᵀ + h·upᵀ + bias | y |
| `_grouped_dy_kernel` | sums | s·dy·up; Σ dy, dyᵀh | one read of dy: S, and d_bias, d_up |
| `_grouped_x_kernel` | sums | Sᵀ·drop(x); Σ_bands S | one read of x: d_down; S for dx |
| `_grouped_bands_kernel` | sums | Σ_bands S | S for dx, where `_grouped_x_kernel` does not sum it |
| `_grouped_dx_kernel` | product | Σ dy·W + Σ mask∘(S·down)/(1-p) | dx |

Inside `batch_invariant` each member is a layer of its own (`apart`).

A path is a low-rank input h that one or more members use. A backward ends with `_finish_kernel` of `glora`.
"""
