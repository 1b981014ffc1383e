"""Tensors that may be kept from one call to the next: real ones that belong to no mode.

A tensor made inside `FakeTensorMode`, a trace (`make_fx`, `torch.export`), a `torch.func` transform or
`torch.inference_mode` belongs to that mode, and is useless or wrong in a call outside. Tensors that are kept are
therefore made outside all modes (`outside_modes`); inside a mode that must see every tensor, none is kept
(`in_a_mode`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

_MODES = torch._C._TorchDispatchModeKey
_TRACING = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)
_constants: dict[tuple[str, torch.device], Tensor] = {}


def in_a_mode() -> bool:
    """Whether tensors are fake, traced or wrapped now; modes that only observe calls (counters, say) do not count."""
    if torch._C._are_functorch_transforms_active():
        return True
    active = torch._C._len_torch_dispatch_stack() > 0  # most calls end here
    return active and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Inside, new tensors are real and ordinary, whatever modes are active."""
    with (
        _disable_current_modes(), temporarily_clear_interpreter_stack(), torch._C.DisableTorchFunction(),
        torch.inference_mode(False), torch.no_grad(),
    ):  # fmt: skip
        yield


def constant(name: str, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
    """The tensor that `build` makes on the CPU, moved to a device and kept: later calls return the same object.

    Inside a mode it is a new tensor of that mode, with the same bits.

    Args:
        name: identifies the values.
        device: of the result.
        build: makes the tensor; it must give the dtype and device of everything that it makes.
    """
    if in_a_mode():
        with outside_modes():
            values = constant(name, torch.device("cpu"), build)
            numbers = values.tolist()
        return torch.tensor(numbers, dtype=values.dtype, device=device)
    found = _constants.get((name, device))
    if found is None:
        with outside_modes():
            found = _constants[name, device] = build().to(device)
    return found


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor on the same memory that can be kept; one of inference mode can later be neither written nor saved."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds values; one on the meta device, or a fake one, has only a shape and a dtype."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
