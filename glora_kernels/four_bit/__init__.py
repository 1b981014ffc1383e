"""Weights in 4 bits: dequantization, and products of few tokens that read the codes. No operator: `glora` calls these.

| kernel | file | computes | used for |
|---|---|---|---|
| `_dequantize_kernel`, `_dequantize_adapted_kernel` | dequantize | W, or W + W∘A + B, from 4 bits | a dense workspace |
| `_small_m_kernel`, `_small_h_kernel` | small_m | y and h of up to 64 tokens from 4-bit W | decoding |

csrc has its own kernels for both, launched by `cuda`; `kinds` chooses between csrc and Triton.
"""
