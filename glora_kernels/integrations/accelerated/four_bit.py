"""PEFT's layers over a bitsandbytes `Linear4bit`, with a forward on our operators. Needs bitsandbytes."""

from __future__ import annotations

from peft.tuners.hira.bnb import Linear4bit as PeftHiraLinear4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLoraLinear4bit

from glora_kernels.integrations.accelerated.layers import HiraOperands, LoraOperands


class LoraLinear4bit(LoraOperands, PeftLoraLinear4bit):
    """`peft.tuners.lora.bnb.Linear4bit`."""

    plain = PeftLoraLinear4bit


class HiraLinear4bit(HiraOperands, PeftHiraLinear4bit):
    """`peft.tuners.hira.bnb.Linear4bit`."""

    plain = PeftHiraLinear4bit


for _kind in (LoraLinear4bit, HiraLinear4bit):
    _kind.__qualname__, _kind.__name__ = _kind.__name__, _kind.plain.__name__
