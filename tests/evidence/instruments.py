"""Where the calls are run, each with what it can tell."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers import poisoned
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from glora_kernels import modes
from glora_kernels.runtime.launch import tensors_of
from glora_kernels.runtime.workspace import private_workspace

DTYPES = (torch.float32, torch.bfloat16)
CAPABILITY = 80
"""What ttsem compiles for. Kernels for sm_90 read by TensorDescriptors of the host, which it reads wrongly."""


class Instrument(NamedTuple):
    """Runs the calls of a form on tensors of `device`, inside `around`. compares: its numbers are a card's."""

    route: str
    device: str
    packages: tuple[str, ...]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    compares: bool = True


class _OnTheHost(TorchFunctionMode):
    """There is no memory to pin where the card's is the host's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "is_pinned":
            return True
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def _reached(kernel_arguments: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """The memory that the addresses in a launch's tables lead to, by where it begins; of every tensor as a whole."""
    words = [t.flatten() for t in tensors_of(tuple(kernel_arguments.values())) if t.dtype == torch.int64]
    addresses = {word for word in torch.cat(words).tolist() if word >> 32} if words else ()
    if not addresses:
        return {}
    alive = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta]
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}
    found = {begin: size for begin, size in sizes.items() if any(begin <= a < begin + size for a in addresses)}
    return {b: np.frombuffer((ctypes.c_uint8 * size).from_address(b), np.uint8) for b, size in found.items()}


class _Stream:
    """The one stream, on which everything is done when its call returns."""

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def executed() -> Iterator[None]:
    """Inside, launches are executed by ttsem from their compiled IR, and tensors of "cuda" lie in host memory.

    It stops at an access outside of a tensor, at two programs of a launch that touch one number of which one writes,
    and at operations without a result; memory that nobody wrote is NaN. It must have checked every launch for races.
    """
    from ttsem import harness, sanitize

    reached: dict[int, np.ndarray] = {}
    record_launch = harness.record_launch

    def recorded(kernel: Any, args: Any, options: dict[str, Any], *more: Any) -> Any:
        reached.clear()
        reached.update(_reached(options))
        return record_launch(kernel, args, options, *more)

    class Memory(harness.Memory):
        """Also what is behind the addresses in a table; what a kernel writes there is written at once."""

        def __init__(self) -> None:
            super().__init__()
            for begin, words in reached.items():
                self.register(begin, words)

    with contextlib.ExitStack() as stack:
        state = stack.enter_context(sanitize.session(CAPABILITY))
        (cuda,) = _get_current_function_mode_stack()
        backward = torch.autograd._engine_run_backward

        def inside(*args: Any, **options: Any) -> Any:
            """Backward on the pretended device as well: PyTorch calls it outside of every mode."""
            with cuda, _OnTheHost():
                return backward(*args, **options)

        for owner, name, value in (
            (torch.autograd, "_engine_run_backward", inside),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "current_stream", lambda device=None: _Stream()),
            (torch._C, "_cuda_getCurrentRawStream", lambda index=0: 0),
            (modes, "outside_modes", nullcontext),
            (harness, "record_launch", recorded),
            (harness, "Memory", Memory),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(_OnTheHost())
        stack.enter_context(private_workspace())
        yield
    assert not state.races_unchecked, f"{state.races_unchecked} launches were too large to be checked for races"


INSTRUMENTS = {
    "eager": Instrument("eager", "cpu", ("torch",)),
    "interpreter": Instrument("triton", "cpu", ("triton",), poisoned),
    "dry_card": Instrument("triton", "cuda", ("triton",), compares=False),
    "ttsem": Instrument("triton", "cuda", ("ttsem", "triton"), executed),
    "card": Instrument("triton", "cuda", ("torch", "triton"), poisoned),
}


def described(name: str) -> str:
    """Of what the instrument is made, and the card that is compiled for."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in INSTRUMENTS[name].packages]
    if name in ("ttsem", "dry_card", "card"):
        with executed() if name == "ttsem" else nullcontext():
            major, minor = torch.cuda.get_device_capability()
            versions.append(f"sm_{major}{minor}" if name != "card" else torch.cuda.get_device_name())
    return ", ".join(versions)
