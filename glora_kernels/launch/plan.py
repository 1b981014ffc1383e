"""A launch as data: which kernel, on which grid, with which arguments. It can be printed, run or compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import environment


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `args` holds every argument by name; `options` num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the current stream of the device of the arguments; nothing for an empty grid."""
        if 0 in self.grid:
            return
        device = next(arg.device for arg in self.args.values() if isinstance(arg, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.args, **self.options)
        else:
            self.kernel[self.grid](**self.args, **self.options)

    def __str__(self) -> str:
        constants = {name: value for name, value in self.args.items() if name.isupper() and name not in "MNKRJ"}
        return f"{self.kernel.__name__}{list(self.grid)} {constants} {self.options}"


def arch_of(tensor: Tensor) -> str:
    """The architecture that the configurations are chosen for: a GPU's, or "cpu" in the interpreter."""
    return environment.arch(tensor.device.index or 0) if tensor.device.type == "cuda" else "cpu"


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """How products are taken: fp32 exactly, unless PyTorch itself may use TF32; UPCAST in the interpreter."""
    ieee = dtype != torch.float32 or not environment.allow_tf32()
    return {"PRECISION": "ieee" if ieee else "tf32", "UPCAST": environment.interpreting()}


def strides(tensor: Tensor | None, *names: str) -> dict[str, int]:
    """The strides of a tensor by argument name; zeros where it is absent."""
    values = (0,) * len(names) if tensor is None else tensor.stride()
    return dict(zip(names, values, strict=True))


def vector_stride(tensor: Tensor | None) -> int:
    """The stride that reads a vector (N,), or repeats a constant (1,)."""
    return 0 if tensor is None or tensor.numel() == 1 else tensor.stride(0)
