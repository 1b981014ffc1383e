"""The public operators. Each works in eager mode, under torch.compile, torch.func and autocast."""

from glora_kernels.experts.op import expert_glora_linear
from glora_kernels.glora.op import glora_linear
from glora_kernels.glora.wc import glora_wc
from glora_kernels.grouped.op import grouped_lora_linear
from glora_kernels.multi.adapter_set import AdapterSet
from glora_kernels.multi.op import multi_glora_linear

__all__ = ["AdapterSet", "expert_glora_linear", "glora_linear", "glora_wc", "grouped_lora_linear", "multi_glora_linear"]
