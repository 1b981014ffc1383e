"""A weight in 4 bits: dequantized, and multiplied by few tokens.

| kernel | file | computes | used for |
|---|---|---|---|
| `_dequantize_kernel`, `_dequantize_adapted_kernel` | dequantize | W, or W + W∘A + B, of 4 bits | a dense workspace |
| `_small_m_kernel`, `_small_h_kernel` | small_m | y and h of up to 64 tokens over 4 bits | decoding |

csrc has its own of each, of which `cuda` is the launcher; `kinds` chooses.
"""
