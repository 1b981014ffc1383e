"""A launch as data: which kernel, on which grid, with which arguments. It can be printed, run or compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import environment
from glora_kernels.quant import QuantizedWeight
from glora_kernels.reference.random import dropout_threshold

_SIZES = ("BLOCK_", "BANDS", "PARTS", "GROUP")


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `args` holds every argument by name; `options` num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the current stream of the device of the arguments; nothing for an empty grid.

        Inside `planning` it is noted instead.
        """
        if 0 in self.grid:
            return
        if _Planning.steps is not None:
            _Planning.steps.append(self)
            return
        values = (v for arg in self.args.values() for v in (arg if isinstance(arg, tuple) else (arg,)))
        bases = (getattr(value, "base", value) for value in values)  # of a descriptor, or the tensor itself
        device = next(base.device for base in bases if isinstance(base, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.args, **self.options)
        else:
            self.kernel[self.grid](**self.args, **self.options)

    def __str__(self) -> str:
        flags = ", ".join(name for name, value in self.args.items() if value is True)
        blocks = ", ".join(f"{name}={value}" for name, value in self.args.items() if name.startswith(_SIZES))
        compiler = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kernel.__name__}{list(self.grid)} {blocks}; {compiler}; {flags or 'no flags'}"


@dataclass(frozen=True)
class LibraryProduct:
    """A product left·right of the vendor's library, added to `out` where `accumulates`: a step beside our launches."""

    left: Tensor
    right: Tensor
    out: Tensor
    accumulates: bool

    def run(self) -> None:
        if _Planning.steps is not None:
            _Planning.steps.append(self)
        elif self.accumulates:
            torch.addmm(self.out, self.left, self.right, out=self.out)
        else:
            torch.mm(self.left, self.right, out=self.out)

    def __str__(self) -> str:
        (m, k), n = self.left.shape, self.right.shape[1]
        return f"library product {m}x{n}x{k}{', added' if self.accumulates else ''}"


class _Planning:
    steps: list[Any] | None = None
    arch: str = ""


@contextlib.contextmanager
def planning(arch: str) -> Iterator[list[Any]]:
    """Inside, the operators' steps are collected and not run: what a card of `arch` would be given, without one.

    For meta tensors, and one thread: `python -m glora_kernels info --layer`, and the tests of launch counts.
    """
    before = _Planning.steps, _Planning.arch
    _Planning.steps, _Planning.arch = [], arch
    try:
        yield _Planning.steps
    finally:
        _Planning.steps, _Planning.arch = before


def is_planning() -> bool:
    """Whether steps are collected: what they would write has no values."""
    return _Planning.steps is not None


def arch_of(tensor: Tensor | QuantizedWeight) -> str:
    """The architecture that the configurations are chosen for: a GPU's, or "cpu" in the interpreter."""
    if _Planning.steps is not None:
        return _Planning.arch
    return environment.arch(tensor.device.index or 0) if tensor.device.type == "cuda" else "cpu"


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How products are taken: fp32 exactly, unless PyTorch itself may use TF32; UPCAST in the interpreter."""
    ieee = dtype != torch.float32 or not environment.allow_tf32()
    return {
        "DTYPE": triton_dtype(dtype),
        "PRECISION": "ieee" if ieee else "tf32",
        "UPCAST": environment.interpreting(),
    }


def factor_arithmetic(dtype: torch.dtype, *factors: Tensor | torch.dtype | None) -> dict[str, Any]:
    """How factors, and what is made with them, are multiplied in a computation in `dtype`: in fp32 where one is wider.

    fp32 beside 16 bits is taken as halves in bfloat16 (`kernels.common._dot`): two or three products of the matrix unit
    where TF32 would take three at half of the speed.
    """
    products = arithmetic(dtype)
    dtypes = (t.dtype if isinstance(t, Tensor) else t for t in factors)
    widens = dtype.itemsize == 2 and any(t is not None and t.itemsize > 2 for t in dtypes)
    return {
        "FACTOR_DTYPE": triton_dtype(torch.float32) if widens else products["DTYPE"],
        "FACTOR_PRECISION": "halves" if widens else products["PRECISION"],
        "UPCAST": products["UPCAST"],
    }


def factor_depth(config: dict[str, int], factors: dict[str, Any]) -> int:
    """The depth of a step of x·downᵀ: of halves, which take registers, no more than 64."""
    return min(config["depth"], 64) if factors["FACTOR_PRECISION"] == "halves" else config["depth"]


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def strides(tensor: Tensor | None, *names: str) -> dict[str, int]:
    """The strides of a tensor by argument name; zeros where it is absent."""
    values = (0,) * len(names) if tensor is None else tensor.stride()
    return dict(zip(names, values, strict=True))


def vector_stride(tensor: Tensor | None) -> int:
    """The stride that reads a vector (N,), or repeats a constant (1,)."""
    return 0 if tensor is None or tensor.numel() == 1 else tensor.stride(0)


def leading_stride(tensor: Tensor | None) -> int:
    """The stride between bands, splits or the entries of a vector; zero where it is absent."""
    return 0 if tensor is None else tensor.stride(0)


def shift(bias: Tensor | None, wc: Tensor | None, d: Tensor | None, e: Tensor | None) -> dict[str, Any]:
    """The arguments of `kernels.common._load_shift`: β = bias∘(1+d) + e + wc, of the terms there are."""
    return {
        "bias_ptr": bias, "stride_bias": leading_stride(bias),
        "wc_ptr": wc,
        "d_ptr": d, "stride_d": vector_stride(d),
        "e_ptr": e, "stride_e": vector_stride(e),
        "HAS_BIAS": bias is not None, "HAS_WC": wc is not None, "HAS_D": d is not None, "HAS_E": e is not None,
    }  # fmt: skip


def descriptor(tensor: Tensor, rows: int, cols: int) -> Any | None:
    """A descriptor of (rows, cols) blocks of a matrix whose rows are contiguous, or None where TMA cannot read it.

    TMA wants a base and row stride in multiples of 16 bytes, and counts rows and columns in 32 bits.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    size = tensor.dtype.itemsize
    fits = (
        min(tensor.shape) > 0
        and max(tensor.shape) < 2**31
        and tensor.stride(1) == 1
        and tensor.stride(0) * size % 16 == 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.data_ptr() % 16 == 0
    )
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, cols]) if fits else None


def dropout(p: float, seed: Tensor | int | None) -> dict[str, Any]:
    """The arguments of a kernel that drops: the key as a number where it is known on the host, else as a pointer."""
    on_device = isinstance(seed, Tensor) and seed.device.type != "cpu"
    value = int(seed) if isinstance(seed, Tensor) and not on_device else seed
    return {
        "seed": 0 if p == 0.0 or value is None else value,
        "threshold": dropout_threshold(p),
        "inv_keep": 1.0 / (1.0 - p),
        "HAS_DROPOUT": p > 0.0,
        "SEED_IS_POINTER": on_device and p > 0.0,
    }


def options(config: dict[str, int], args: dict[str, Any] | None = None) -> dict[str, int]:
    """The compiler's options of a configuration.

    Halves of fp32 factors take registers: beside them, more warps share a tile.
    """
    warps = config["num_warps"]
    if args is not None and args.get("FACTOR_PRECISION") == "halves":
        warps = max(warps, 8)
    return {"num_warps": warps, "num_stages": config["num_stages"]}
