"""The literal mathematics in eager PyTorch: the oracle that everything else is compared with."""

from glora_kernels.reference.glora import effective_bias, effective_weight, glora_linear
from glora_kernels.reference.random import dither_bits, keep_mask, round_dithered

__all__ = ["dither_bits", "effective_bias", "effective_weight", "glora_linear", "keep_mask", "round_dithered"]
