"""Floor 3: the registered operators: schema, fake, CPU and GPU implementation, autograd, autocast, flops."""

from glora_kernels.ops import flops
from glora_kernels.ops.glora import glora_linear
from glora_kernels.ops.grouped import grouped_lora_linear
from glora_kernels.ops.wc import glora_wc

__all__ = ["flops", "glora_linear", "glora_wc", "grouped_lora_linear"]
