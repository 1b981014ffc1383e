"""What the tests of 4-bit models share."""

from glora_kernels import GLoRAConfig

FULL = GLoRAConfig("vector", "lora", "lora", "vector", "vector", rank=3, alpha=6)

TARGETS = ["embed", "blocks.*"]
"""Of the classifier, all but its head."""


def packed_layers(model):
    return {path: m for path, m in model.named_modules() if getattr(m, "quant_state", None) is not None}
