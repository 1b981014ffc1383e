"""4-bit weights: codebooks, the codec in plain PyTorch, and the quantized-weight type, bit for bit bitsandbytes'."""

from glora_kernels.quant.codec import decoded_at_once, dequantize, quantize_weight
from glora_kernels.quant.weight import NestedState, QuantizedWeight, QuantState

__all__ = ["NestedState", "QuantState", "QuantizedWeight", "decoded_at_once", "dequantize", "quantize_weight"]
