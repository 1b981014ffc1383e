"""Floor 2: the Triton kernels. They allocate nothing and choose nothing; `launch` does.

| kernel | file | computes | used for |
|---|---|---|---|
| `_prepare_kernel` | prepare | s·drop(x)·Vᵀ, Σₖ x; W·A_up or W∘(1+A) | h, P, σ; U or W_eff, in one launch |
| `_glora_fwd_kernel` | glora | (x·Wᵀ)∘(1+a) + P·Uᵀ + h·B_upᵀ + σ·bᵀ + β | y |
| `_added_terms_kernel` | prepare | h, σ, and y's terms beside the vendor's product | y on the library route |
| `_dy_kernel` | sums | dy·B_up, dy·b; dyᵀh, Σ dy, dyᵀσ, Σ dy∘y | one read of dy: S, τ, and dB_up, g, dB, dA |
| `_x_kernel` | sums | Sᵀ·drop(x); S·B_down | one read of x: dB_down; dx's terms on the library route |
| `_hadamard_grad_kernel` | weight | (dyᵀx)∘W, reduced with A_down and A_up | dA of lora; W_eff and dB_down on the way |
| `_glora_dx_kernel` | glora | (dy∘(1+a))·W + mask∘(S·B_down)/(1-p) + τ·1ᵀ | dx |
| `_finish_kernel` | finish | sums of partial sums, as gradients | every gradient; dA of a vector from y |
| `_totals_kernel` | finish | Σₙ | gradients of constants |
| `_dequantize_kernel`, `_dequantize_adapted_kernel` | dequantize | W, or W + W∘A + B, of 4 bits | a dense workspace |
| `_small_m_kernel`, `_small_h_kernel` | small_m | y and h of up to 64 tokens over 4 bits | decoding |
| `_wc_kernel` | weight | W·c | C's share of β |
| `_wc_grad_kernel`, `_c_grad_kernel` | weight | Wᵀg, and its factors' gradients | dC |

Conventions: operands as structures (`operands`), None where absent; sizes; scalars; constexprs; BLOCK_*. Sums are fp32,
with one cast at the store. Nothing is added with atomics: what several programs contribute to goes to partial sums, so
that two runs give the same bits.
"""
