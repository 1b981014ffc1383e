"""One GLoRA layer, y = (x·Wᵀ)∘(1+A) + …: its two operators (`op`, `wc`), the eager path, the Triton path, the kernels.

| kernel | file | computes | used for |
|---|---|---|---|
| `_prepare_kernel` | prepare | s·drop(x)·Vᵀ, Σₖ x; W·A_up or W∘(1+A) | h, P, σ; U or W_eff, in one launch |
| `_glora_fwd_kernel` | product | (x·Wᵀ)∘(1+a) + P·Uᵀ + h·B_upᵀ + σ·bᵀ + β | y |
| `_added_terms_kernel` | prepare | h, σ, and all terms of y but the GEMM | y on the library route |
| `_dy_kernel` | sums | dy·B_up, dy·b; dyᵀh, Σ dy, dyᵀσ, Σ dy∘y | one read of dy: S, τ, and dB_up, g, dB, dA |
| `_x_kernel` | sums | Sᵀ·drop(x); S·B_down | one read of x: dB_down; dx's terms on the library route |
| `_hadamard_grad_kernel` | weight | (dyᵀx)∘W, reduced with A_down and A_up | dA of lora; W_eff and dB_down on the way |
| `_glora_dx_kernel` | product | (dy∘(1+a))·W + mask∘(S·B_down)/(1-p) + τ·1ᵀ | dx |
| `_finish_kernel` | finish | sums of partial sums, as gradients | every gradient; dA of a vector from y |
| `_totals_kernel` | finish | Σₙ | gradients of constants |
| `_wc_kernel` | weight | W·c | C's share of β |
| `_wc_grad_kernel`, `_c_grad_kernel` | weight | Wᵀg, and its factors' gradients | dC |

`by_rows` takes the place of `eager` inside `batch_invariant`.

A 4-bit W first goes through `four_bit`: dequantized into a workspace, or for a few tokens multiplied from its codes.

Conventions for the kernels of every folder: operands come as structures (`operands`), None where absent; then sizes and
scalars; then, on lines of their own, constants, where BLOCK_* are the sides of a tile. Sums are fp32, with one cast at
the store. No atomics: where several programs contribute to a number they write partial sums, so that two runs give the
same bits. Below each kernel is its launcher, which turns tensors into a `Launch` and allocates nothing: the passes
(`triton`) allocate. The caller passes `arch` (`planning.arch_of`), so that a launch can be planned for another card.
"""
