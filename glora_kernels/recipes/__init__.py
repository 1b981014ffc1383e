"""Ten published methods on GLoRA's layers and PEFT's LoRA: a file each, that reads like the method's description."""

from glora_kernels.integrations.callbacks import lightning_callback, trainer_callback
from glora_kernels.recipes.beamlora import BeamLoRA
from glora_kernels.recipes.cola import ChainOfLoRA
from glora_kernels.recipes.diffora import DiffoRA
from glora_kernels.recipes.dynamic import DynamicLoRA
from glora_kernels.recipes.gelora import gelora
from glora_kernels.recipes.mtl import MTLLoRA
from glora_kernels.recipes.prilora import PRILoRA, inject_prilora
from glora_kernels.recipes.recipe import Recipe
from glora_kernels.recipes.recycle import invert, prototype_logits, recycle
from glora_kernels.recipes.rite import lora_rite
from glora_kernels.recipes.xgblora import XGBLoRA

__all__ = [
    "BeamLoRA",
    "ChainOfLoRA",
    "DiffoRA",
    "DynamicLoRA",
    "MTLLoRA",
    "PRILoRA",
    "Recipe",
    "XGBLoRA",
    "gelora",
    "inject_prilora",
    "invert",
    "lightning_callback",
    "lora_rite",
    "prototype_logits",
    "recycle",
    "trainer_callback",
]
