"""Layers that read one input, or come at once: the forward and the backward of all of them in a few launches.

| kernel | file | computes, of every member i or path t | used for |
|---|---|---|---|
| `_grouped_down_kernel` | sums | s·drop(x)·downᵀ | h, where the product does not make it |
| `_grouped_fwd_kernel` | product | x·Wᵀ + h·upᵀ + bias | y |
| `_grouped_dy_kernel` | sums | s·dy·up; Σ dy, dyᵀh | one read of dy: S, and d_bias, d_up |
| `_grouped_x_kernel` | sums | Sᵀ·drop(x); Σ_bands S | one read of x: d_down; S for dx |
| `_grouped_bands_kernel` | sums | Σ_bands S | S for dx, where nobody reads x |
| `_grouped_dx_kernel` | product | Σ dy·W + Σ mask∘(S·down)/(1-p) | dx |

A path is a low-rank input h that one or more members use. `glora._finish_kernel` ends a backward here as well.
"""
