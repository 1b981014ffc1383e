"""Chooses the path of a call: from the user's `backend(...)`, or with "auto" from device and dtype."""

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
    """The choice, which holds for the whole process.

    An attribute of an instance, because torch.compile (2.11) guards on that, and not on an attribute of a class.
    """

    def __init__(self) -> None:
        self.backend: Backend = "auto"
        self.invariant = False


_state = _State()


def chosen() -> Backend:
    """The backend that is in force."""
    return _state.backend


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the path of every layer called inside: "auto", "eager", "triton" or "cuda".

    The choice is read at forward and kept for that call's backward, which runs in another thread. It holds for
    the whole process.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> with gk.backend("eager"):
        ...     y = model(torch.randn(2, 16))  # plain PyTorch, to compare the kernels with
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    before, _state.backend = _state.backend, name
    try:
        yield
    finally:
        _state.backend = before


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside, the bits of a row of y and of dx do not depend on the other rows of the call.

    y[m] is a function of x[m], dx[m] of dy[m], of the frozen weight as it lies in memory, of the row's adapter and,
    with dropout, of the row's own mask (which goes by the row's number among those of its adapter). So a sequence has
    the same bits alone and in any batch, at any place of it, as a slice or a view of any layout, and in forwards with
    and without gradients; and a row in `ops.multi_glora_linear` has those of `ops.glora_linear` with its adapter. So
    have the gradients of each adapter there: those of `ops.glora_linear` with its rows alone, in the same order
    (unless several adapters hold one tensor, whose gradients are added up). Gradients of parameters are sums over the
    rows, and depend on which rows there are. Two calls are compared on one device in one process, with the same
    versions, the same dtypes, `torch.set_num_threads` and TF32 setting; other processors may give other bits.

    It covers every operator of `ops`, and all layers of this package, merged, disabled and grouped ones too. It does
    not cover the rest of a model: attention, norms, layers that are not ours, and in PEFT models the layers whose base
    computes alone (disabled, merged) or that `acceleration` counts under PEFT's forward. The choice is read at forward
    and kept for that call's backward; it holds for the whole process.

    How, and what it costs. On the eager path every row is computed by itself, since no BLAS promises more than the
    same bits for the same shapes: W is read once a row (a LoRA layer of 1024 x 1024 and rank 16 in fp32, forward and
    backward with 256 rows: 7.2 times as long on two cores of an AMD EPYC with torch 2.13.0). Rounding to 16 bits
    dithers by column alone. With kernels, which no card has run in this mode yet, a row's bits rest on a matrix unit
    that sums every number of a tile in one order, wherever it stands. Every configuration is that of one number of
    rows; W is multiplied by this package's own kernel and never by the vendor's GEMM, also where W has 4 bits; and
    W∘(1+a) is built before dx. `ops.multi_glora_linear` and `ops.grouped_lora_linear` take the launches of a single
    layer for each adapter or member, and the former sorts the rows on the host and computes forward again in backward.

    Without it: the same call has the same bits whenever it is repeated, while a row may have others in a call of
    another M or at another place.

    Raises:
        RuntimeError: (in a call inside) it is transformed by torch.func, forward-mode differentiation or torch.jit,
            or its gradients are batched, which takes PyTorch's own operations; or `ops.multi_glora_linear` is called
            while a CUDA graph is captured.

    Examples:
        >>> model, x = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), ["0"]), torch.randn(8, 16)
        >>> with gk.batch_invariant():
        ...     torch.equal(model(x)[:1], model(x[:1]))
        True
    """
    before, _state.invariant = _state.invariant, True
    try:
        yield
    finally:
        _state.invariant = before


def invariant() -> bool:
    """Whether `batch_invariant` is in force."""
    return _state.invariant


def route(device_type: str, dtype: torch.dtype, four_bit: bool = False) -> str:
    """The path of one call: "eager" or "triton". It depends on the arguments, the user's choice and TRITON_INTERPRET.

    With a 4-bit base also "auto" or "cuda": the Triton path, whose 4-bit operations are then of the faster kind, or of
    csrc (`four_bit.kinds`). Inside `batch_invariant` any of them with `_INVARIANT` behind it.

    Raises:
        RuntimeError: a forced backend cannot serve this device or dtype.
    """
    return _route(device_type, dtype, four_bit) + _INVARIANT * _state.invariant


_INVARIANT = " invariant"


def is_invariant(route: str) -> bool:
    """Whether a call was made inside `batch_invariant`."""
    return route.endswith(_INVARIANT)


def plain(route: str) -> str:
    """The route outside of `batch_invariant`."""
    return route.removesuffix(_INVARIANT)


def is_eager(route: str) -> bool:
    """Whether a call runs as plain PyTorch, not as kernels."""
    return plain(route) == "eager"


def _route(device_type: str, dtype: torch.dtype, four_bit: bool) -> str:
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
    """Whether Triton kernels can take tensors of a device: a GPU, the CPU in the interpreter, "meta" while planning."""
    return _is_a_card(device_type) or (device_type == "cpu" and environment.interpreting())


def _is_a_card(device_type: str) -> bool:
    """Whether a device is a GPU, or "meta" while a call is planned for a GPU that need not be here."""
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
    """The path that "auto" takes for this device and dtype, and the reason."""
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
    """How the Triton path computes its large product: "fused" in our own kernel, or "library", the vendor's GEMM.

    A measured table decides where it has a row near the shape, else the cost model (`runtime.cost`). The fused kernel
    is taken for a weight wider than x (autocast), which it need not cast, and on an unknown card; also, where nothing
    was measured, for a call that builds W_eff (`builds`: A is lora): the library route takes one more launch per pass.
    """
    what = f"route {'dx' if backward else 'fwd'}{' scaled' * scales}"
    asked = what, arch, dtype, shape, weight_dtype
    route = str(tables.choose(*asked))
    return "fused" if builds and tables.explain(*asked)[1] == "cost model" else route
