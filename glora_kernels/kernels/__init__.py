"""Floor 2: the Triton kernels. They allocate nothing and choose nothing; `launch` does.

| kernel | computes | used for |
|---|---|---|
| `_glora_fwd_kernel` | (x·Wᵀ)∘(1+a) + h·UPᵀ + σ·bᵀ + β | y |
| `_glora_dx_kernel` | (dy∘(1+a))·W + mask∘(S·DOWN)/(1-p) + τ·1ᵀ | dx |
| `_project_kernel` | s·drop(X)·Vᵀ and X·v | h, P, U, S, σ, τ, Wᵀg |
| `_factor_grad_kernel` | Sᵀ·drop(X), Σ X, Xᵀσ, Σ X∘Y | dB, dβ, dA of a vector, the product variant's dA |
| `_hadamard_grad_kernel` | (dyᵀx)∘W, reduced with A_down and A_up | dA of lora; of a vector where y does not give it |
| `_weff_kernel` | W∘(1 + A_up·A_down) | the weight of y and dx where A is lora |
| `_beta_kernel` | b∘(1+d) + e + W·c | β |

Conventions: a pointer, then its strides; sizes; scalars; flags; BLOCK_*. A constant (1,) is a vector with
stride 0. Presence is a flag. Sums are fp32, with one cast at the store. Nothing is added with atomics: what
several programs contribute to goes to partial sums, so that two runs give the same bits.
"""
