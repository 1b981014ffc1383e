"""Configurations that the tests of one layer share: small ranks, each support in each of its forms."""

from glora_kernels import GLoRAConfig

SMALL = {
    "default": GLoRAConfig(rank=3),
    "lora": GLoRAConfig.lora(rank=3, alpha=6),
    "vectors": GLoRAConfig("vector", "vector", "vector", "vector", "vector"),
    "constants": GLoRAConfig("constant", "constant", "none", "constant", "constant"),
    "nothing": GLoRAConfig("none", "none", "none", "none", "none"),
    "matmul": GLoRAConfig("lora", "lora", "vector", "none", "vector", rank=3, variant="matmul"),
}
