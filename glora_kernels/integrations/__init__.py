"""Other people's libraries: PEFT's layers on our operators, and our methods in PEFT's registry.

Nothing here imports those libraries before it is used.
"""

from glora_kernels.integrations.accelerated.switch import AccelerationReport, accelerate, acceleration, decelerate

__all__ = ["AccelerationReport", "accelerate", "acceleration", "decelerate"]
