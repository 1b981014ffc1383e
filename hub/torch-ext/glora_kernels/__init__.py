"""The operators of glora_kernels, as a kernel of the Hugging Face hub. The layers are in the package of that name."""

from .ops import (
    AdapterSet,
    expert_glora_linear,
    glora_linear,
    glora_wc,
    grouped_lora_linear,
    multi_glora_linear,
)
from .quant import QuantizedWeight, dequantize, quantize_weight
from .runtime.routes import backend, batch_invariant

__all__ = [
    "AdapterSet",
    "QuantizedWeight",
    "backend",
    "batch_invariant",
    "dequantize",
    "expert_glora_linear",
    "glora_linear",
    "glora_wc",
    "grouped_lora_linear",
    "multi_glora_linear",
    "quantize_weight",
]
