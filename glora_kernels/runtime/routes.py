"""Which path serves a call: the user's `backend(...)` choice, and what "auto" makes of a device and a dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from glora_kernels.runtime import environment, extension, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.planning import is_planning

Backend = Literal["auto", "eager", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
TRITON_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


class _State:
    """The process-wide choice, which every thread sees.

    An attribute of an object: torch.compile guards on it, and in torch 2.11 not on one of a class.
    """

    def __init__(self) -> None:
        self.backend: Backend = "auto"


_state = _State()


def chosen() -> Backend:
    """The choice that is in force."""
    return _state.backend


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the path of every layer called inside: "auto", "eager", "triton" or "cuda".

    The choice is read at forward and kept for that call's backward, which runs in another thread. It holds for
    the whole process.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    before, _state.backend = _state.backend, name
    try:
        yield
    finally:
        _state.backend = before


def route(device_type: str, dtype: torch.dtype, four_bit: bool = False) -> str:
    """The path of one call: "eager" or "triton". Pure, but for the user's choice and TRITON_INTERPRET.

    Over a 4-bit base also "auto" and "cuda": everything but the 4-bit operations is the Triton path then, and those are
    of the faster kind or of csrc (`four_bit.kinds`).

    Raises:
        RuntimeError: a forced backend that cannot serve this device or dtype.
    """
    choice = _state.backend
    if choice == "eager":
        return "eager"
    if choice == "auto":
        path = explain(device_type, dtype)[0]
        return "auto" if four_bit and path == "triton" else path
    if choice == "cuda":
        _check_extension(device_type, four_bit)
    elif not can_launch(device_type):
        raise RuntimeError(
            f"backend('triton') needs a GPU, got tensors on {device_type!r}; on a CPU it runs in Triton's interpreter "
            "only: set TRITON_INTERPRET=1 before Python starts"
        )
    if dtype not in TRITON_DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in TRITON_DTYPES)
        raise RuntimeError(f"backend({choice!r}) accepts {names}; got {str(dtype).removeprefix('torch.')}")
    return choice


def can_launch(device_type: str) -> bool:
    """Whether Triton's kernels can take tensors of a device: a GPU's, a CPU's in the interpreter, planned ones."""
    return _is_a_card(device_type) or (device_type == "cpu" and environment.interpreting())


def _is_a_card(device_type: str) -> bool:
    """Whether tensors are on a GPU, or are those of a call that is planned for one that need not be here."""
    return device_type == "cuda" or (device_type == "meta" and is_planning())


def _check_extension(device_type: str, four_bit: bool) -> None:
    if not four_bit:
        raise RuntimeError(
            "backend('cuda') was asked for, but the CUDA extension serves no layer with a dense base; "
            "use backend('triton'), 'eager' or 'auto'"
        )
    if device_type == "meta" and is_planning():
        return
    if (reason := extension.why_missing()) is not None:
        raise RuntimeError(f"backend('cuda'): {reason}")
    if device_type != "cuda":
        raise RuntimeError(f"backend('cuda') needs a GPU, got tensors on {device_type!r}")
    if torch.cuda.is_initialized() and (reason := extension.why_missing(environment.arch(torch.cuda.current_device()))):
        raise RuntimeError(f"backend('cuda') cannot run here: {reason}")


def explain(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """What "auto" does with a layer of this device and dtype, and why."""
    if not _is_a_card(device_type):
        return "eager", f"no Triton code for {device_type!r} devices: the factored path in plain PyTorch"
    if dtype not in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return "eager", f"the kernels have no {name}: the factored path in plain PyTorch"
    return "triton", "Triton kernels, forward and backward"


def product_route(
    arch: str,
    dtype: torch.dtype,
    shape: Shape,
    weight_dtype: torch.dtype,
    *,
    backward: bool,
    scales: bool,
    builds: bool = False,
) -> str:
    """How the Triton path takes its large product: "fused" into our own kernel, or by the vendor's "library".

    A function of its arguments and the tables read at start: a measured table decides where it has a row near the
    shape, else the cost model (`runtime.cost`). A weight wider than x (autocast) and an unknown card take the fused
    kernel, which needs nothing cast or guessed; so does a call that builds W_eff, unmeasured (`builds`: A is lora),
    which the library's route would cost one more launch a pass.
    """
    what = f"route {'dx' if backward else 'fwd'}{' scaled' * scales}"
    asked = what, arch, dtype, shape, weight_dtype
    route = str(tables.choose(*asked))
    return "fused" if builds and tables.explain(*asked)[1] == "cost model" else route
