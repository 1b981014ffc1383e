"""Floor 3: the registered operators: schema, fake, CPU and GPU implementation, autograd, autocast, flops."""

from glora_kernels.ops import flops
from glora_kernels.ops.beta import glora_beta
from glora_kernels.ops.glora import glora_linear

__all__ = ["flops", "glora_beta", "glora_linear"]
