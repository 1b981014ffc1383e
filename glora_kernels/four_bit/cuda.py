"""The launchers of the CUDA extension: checks of shapes, dtypes and devices, the configuration, the launch.

The extension takes raw pointers and checks nothing. It can be built without a GPU and may be missing
(`runtime.extension`); launches can be planned and printed without it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glora_kernels.four_bit.served import ALIGNMENT, is_power_of_two, why_not
from glora_kernels.modes import outside_modes
from glora_kernels.operands import W_ALONE, Terms
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import extension, tables
from glora_kernels.runtime.configs import GEMV_TOKENS, SCRATCH_FLOATS, Shape
from glora_kernels.runtime.launch import vector_stride
from glora_kernels.runtime.planning import note
from glora_kernels.runtime.recording import Bound
from glora_kernels.runtime.workspace import is_private

MAX_DEQUANTIZE_RANK = 256

_THREADS = 256
_BARRIER_FLOATS = 64  # the counters, and the rest of their 256 bytes
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_VECTOR = (0, 0, 0)
_NO_MATRIX = (0, 0, 0, 0)


@dataclass(frozen=True)
class CudaLaunch:
    """One launch of the extension. `entry`: the function's name. A tensor in `args` is passed as its address."""

    kernel: str
    entry: str
    grid: int
    shared: int
    args: dict[str, Any]
    tensors: tuple[Tensor, ...]
    block: int = _THREADS
    for_m: Callable[[int], dict[str, Any]] | None = None  # M → the fields and arguments that depend on M

    def run(self) -> None:
        """Launch on the current stream of the tensors' device. Inside `planning` it is recorded instead.

        Raises:
            RuntimeError: the extension is missing, the tensors are not on a GPU, or CUDA reports an error.
        """
        if note(self):
            return
        device = self.tensors[0].device
        if device.type != "cuda":
            raise RuntimeError(f"the CUDA extension works on GPU tensors, these are on {device}")
        function = getattr(extension.module(), self.entry)
        if device.index == torch.cuda.current_device():
            self._launch(function, device)
        else:
            with torch.cuda.device(device):
                self._launch(function, device)

    def _launch(self, function: Callable[..., None], device: torch.device) -> None:
        stream = torch.cuda.current_stream(device)
        args = addresses(self.args)
        if args.get("scratch"):
            counters, sums = _scratch(stream)  # alive until the launch is in the queue
            args = args | {"barrier": counters.data_ptr(), "scratch": sums.data_ptr()}
        function(device=stream.device_index, stream=stream.cuda_stream, **args)

    def bound(self, call: Bound) -> CudaLaunch:
        """This recorded launch with the tensors and the M of another call."""
        own = {} if self.for_m is None else self.for_m(call.m)
        args = {name: _changed(value, call.pointer) for name, value in self.args.items()} | own.pop("args", {})
        return replace(self, args=args, tensors=tuple(map(call.pointer, self.tensors)), **own)

    def __str__(self) -> str:
        return f"{self.kernel}[{self.grid}] block={self.block}; shared={self.shared}"


def addresses(args: dict[str, Any]) -> dict[str, Any]:
    return {name: _changed(value, lambda tensor: tensor.data_ptr()) for name, value in args.items()}


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """An argument with `change` applied to every tensor in it."""
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def dequantize_launch(
    weight: QuantizedWeight, out: Tensor, *,
    a: Tensor | None = None, a_up: Tensor | None = None, a_down: Tensor | None = None,
    b: Tensor | None = None, b_up: Tensor | None = None, b_down: Tensor | None = None,
    scale: float = 1.0, arch: str,
) -> CudaLaunch:  # fmt: skip
    """out (N,K) = W, or W + W∘A + B with A = a or a_up·a_down, B = b or scale·b_up·b_down.

    W alone has the same bits as `quant.dequantize`. With A or B the sum is computed in fp32 and rounded once, to 16
    bits with the dither of `reference.random.round_dithered`.

    Args:
        weight: (N, K) in 4 bits.
        out: (N, K), contiguous, in fp32, fp16 or bf16, written.
        a, b: (N,) or (1,), in fp32, fp16 or bf16.
        a_up, b_up: (N, R), any strides, R from 1 to 256.
        a_down, b_down: (R, K), any strides.
        scale: of the low-rank form of B.
        arch: of the card the launch is planned for; one configuration serves all.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape, stride, rank or device that does not fit, or both forms of A or B.
    """
    n, k = weight.shape
    _check_type("out", out)
    if tuple(out.shape) != (n, k) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {n}x{k}; got {tuple(out.shape)} with strides {out.stride()}")
    given = _Operands(weight)
    given.add("out", out)
    before = len(given.tensors)
    terms = {"a": given.term("a", a, a_up, a_down), "b": given.term("b", b, b_up, b_down)}
    adapted = len(given.tensors) > before
    aligned = weight.packed.data_ptr() % 4 == 0 and out.data_ptr() % ALIGNMENT == 0
    args = {
        "codes": _codes(weight, out.dtype), "out": out, "out_dtype": _DTYPES[out.dtype], "n": n, "k": k, **terms,
        "scale": scale, "vectorized": aligned and (not adapted or k % 8 == 0),
    }  # fmt: skip
    if adapted:
        grid, shared, name = -(-n // 32) * -(-k // 256), 4 * 16 * (32 + 256), "dequantize_adapted_kernel"
    else:
        grid, shared, name = -(-n * k // (8 * 4 * _THREADS)), 0, "dequantize_kernel"
    if grid >= 1 << 31:
        raise ValueError(f"weight {n}x{k} takes more blocks than a grid has")
    return CudaLaunch(name, "dequantize", grid, shared, args, tuple(given.tensors))


def small_m_launch(
    x: Tensor, weight: QuantizedWeight, y: Tensor, added: Terms = W_ALONE, *,
    b_down: Tensor | None = None, scale: float = 1.0, h: Tensor | None = None, sigma: Tensor | None = None, arch: str,
) -> CudaLaunch:  # fmt: skip
    """y = Z∘(1+a) + h·B_upᵀ + σ·bᵀ + bias∘(1+d) + e + wc with Z = x·Wᵀ, h = scale·x·B_downᵀ, σ = Σₖ xₖ.

    One launch. Sums are in fp32 and rounded once, to nearest; B_down is multiplied in x's dtype. With up to 4 tokens,
    W is decoded to fp32; with more, it is also rounded to x's dtype. Every run gives the same bits.

    Args:
        x: (M, K), for which `served.why_not` is None.
        weight: (N, K) in 4 bits.
        y: (M, N) in x's dtype, any strides, written.
        added: a, b, d and e (N,) or (1,), in fp32, fp16 or bf16, d only with a bias; bias and wc (N,); up: B_up (N, R)
            of any strides, only with b_down.
        b_down: (R, K), any strides.
        scale: s.
        h, sigma: (M, R) in x's dtype and (M,) fp32, contiguous, written where given; h needs the factors.
        arch: of the card; decides the split of K over the warps and the grid.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a call that `served.why_not` refuses, or a shape, stride or device that does not fit.
    """
    a, b, b_up, (bias, wc, d, e, _) = added.a, added.b, added.up, added.shift
    given, (m, k), n = _Operands(weight), x.shape, weight.shape[0]
    up, down, rank = given.pair("b", b_up, b_down)
    if reason := why_not("cuda", x, weight, rank):
        raise ValueError(f"the fused product over a 4-bit weight does not serve this call: {reason}")
    if y.dtype != x.dtype:
        raise TypeError(f"y must be {x.dtype} as x is, got {y.dtype}")
    if tuple(y.shape) != (m, n):
        raise ValueError(f"y must be {m}x{n}, got {tuple(y.shape)}")
    if d is not None and bias is None:
        raise ValueError("d multiplies the bias, and there is none")
    given.add("x", x)
    given.add("y", y)
    has_sigma = b is not None or sigma is not None
    args = {
        "codes": _codes(weight, x.dtype), "x": (x, x.stride(0)), "x_dtype": _DTYPES[x.dtype], "y": (y, *y.stride()),
        "a": given.vector("a", a), "b": given.vector("b", b), "d": given.vector("d", d), "e": given.vector("e", e),
        "bias": given.vector("bias", bias, constant=False), "wc": given.vector("wc", wc, constant=False),
        "b_up": up, "b_down": down, "rank": rank, "scale": scale,
        "h": given.made("h", h, (m, rank), x.dtype),
        "sigma": given.made("sigma", sigma, (m,), torch.float32), "has_sigma": has_sigma, "barrier": 0,
        "scratch": 1 if rank or has_sigma else 0,
    }  # fmt: skip

    def for_m(m: int) -> dict[str, Any]:
        own = small_m_config(m, n, k, rank, has_sigma, arch)
        kernel = "small_m_gemv_kernel" if m <= GEMV_TOKENS else "small_m_mma_kernel"
        sized = {"gemv": m <= GEMV_TOKENS, "sizes": (m, n, k)}
        return {"kernel": kernel, "grid": own["blocks"], "shared": own["shared_bytes"], "args": sized | own}

    own = for_m(m)
    args |= own.pop("args")
    return CudaLaunch(entry="small_m", args=args, tensors=tuple(given.tensors), for_m=for_m, **own)


def small_m_config(m: int, n: int, k: int, rank: int, has_sigma: bool, arch: str) -> dict[str, int]:
    """The configuration of a small-M launch: `configs.csrc_small_m`, the same for all dtypes."""
    what = "small_m csrc sums" if has_sigma else "small_m csrc"
    config: dict[str, int] = tables.choose(what, arch, torch.bfloat16, Shape(m, n, k, rank))
    return config


_SLOTS, _SLOT_WORDS = 16384, 8
_scratch_lock = threading.Lock()
_scratches: dict[tuple[int, int], Tensor] = {}
_slots: dict[int, tuple[Tensor, Iterator[int]]] = {}


def _scratch(stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
    """(counters, memory for partial sums). Every launch needs counters that are zero and leaves them zero.

    | the launch is | memory for sums | counters |
    |---|---|---|
    | eager | one buffer per (device, stream), since launches on a stream do not overlap | in that buffer |
    | captured in a CUDA graph | allocated in the graph | a slot that is never used again, so that no node clears it |
    | in a compiled graph, or no slot is left | allocated, as the graph must own what it writes | there, cleared |
    """
    device, index = stream.device, stream.device_index
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing and not is_private():
        key = (index, stream.cuda_stream)
        with _scratch_lock:
            if key not in _scratches:
                with outside_modes():
                    _scratches[key] = torch.zeros(_BARRIER_FLOATS + SCRATCH_FLOATS, dtype=torch.float32, device=device)
            if index not in _slots:
                with outside_modes():
                    counters = torch.zeros(_SLOTS, _SLOT_WORDS, dtype=torch.int32, device=device)
                _slots[index] = counters, itertools.count()
                stream.synchronize()
            buffer = _scratches[key]
        return buffer, buffer[_BARRIER_FLOATS:]
    if capturing and not is_private() and index in _slots:
        counters, numbers = _slots[index]
        if (number := next(numbers)) < _SLOTS:
            return counters[number], torch.empty(SCRATCH_FLOATS, dtype=torch.float32, device=device)
    buffer = torch.empty(_BARRIER_FLOATS + SCRATCH_FLOATS, dtype=torch.float32, device=device)
    buffer[:_SLOT_WORDS].zero_()
    return buffer, buffer[_BARRIER_FLOATS:]


def _codes(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `gk::Codes` for a result in `dtype`; a weight quantized from `dtype` is rounded only once."""
    state, nested = weight.state, weight.state.nested
    log2 = state.blocksize.bit_length() - 1
    is_fp4 = state.quant_type == "fp4"
    stored = 0 if state.dtype == dtype else _DTYPES[state.dtype]
    if nested is None:
        return (weight.packed, state.absmax, 0, 0, 0, 0, log2, 0, is_fp4, stored)
    if not is_power_of_two(nested.blocksize):
        raise ValueError(f"the nested block size must be a power of two, got {nested.blocksize}")
    return (
        weight.packed, 0, state.absmax, nested.absmax, nested.code,
        nested.offset, log2, nested.blocksize.bit_length() - 1, is_fp4, stored,
    )  # fmt: skip


class _Operands:
    """Checks the tensors of a launch and turns them into the structures of csrc. `tensors`: all tensors so far."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.n, self.k = weight.shape
        self.tensors: list[Tensor] = [weight.packed, *weight.state.tensors()]

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.tensors[0].device:
            raise ValueError(f"the weight is on {self.tensors[0].device}, {name} on {tensor.device}")
        self.tensors.append(tensor)

    def made(self, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | int:
        """Memory for a result, or 0 if it is not wanted."""
        if tensor is None:
            return 0
        if 0 in shape or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        self.add(name, tensor)
        return tensor

    def vector(self, name: str, tensor: Tensor | None, constant: bool = True) -> tuple[Any, int, int]:
        """A `gk::Vector`: (N,), or with `constant` also (1,), which is repeated."""
        if tensor is None:
            return _NO_VECTOR
        _check_type(name, tensor)
        if tuple(tensor.shape) != (self.n,) and not (constant and tuple(tensor.shape) == (1,)):
            raise ValueError(f"{name} must be ({self.n},){' or (1,)' if constant else ''}, got {tuple(tensor.shape)}")
        self.add(name, tensor)
        return (tensor, vector_stride(tensor), _DTYPES[tensor.dtype])

    def pair(self, name: str, up: Tensor | None, down: Tensor | None) -> tuple[tuple[Any, ...], tuple[Any, ...], int]:
        """(`gk::Matrix` of up (N,R), `gk::Matrix` of down (R,K), R)."""
        if (up is None) != (down is None):
            raise ValueError(f"{name}_up and {name}_down are given together or not at all")
        if up is None or down is None:
            return _NO_MATRIX, _NO_MATRIX, 0
        if (rank := up.shape[-1]) < 1:
            raise ValueError(f"the rank of {name}_up must be at least 1, got shape {tuple(up.shape)}")
        return self._matrix(f"{name}_up", up, (self.n, rank)), self._matrix(f"{name}_down", down, (rank, self.k)), rank

    def term(self, name: str, vector: Tensor | None, up: Tensor | None, down: Tensor | None) -> tuple[Any, ...]:
        """A `gk::Term`: A or B as a vector or as a pair."""
        if vector is not None and (up is not None or down is not None):
            raise ValueError(f"{name} and its factors {name}_up, {name}_down cannot both be given")
        pair = self.pair(name, up, down)
        if pair[2] > MAX_DEQUANTIZE_RANK:
            raise ValueError(f"the rank of {name}_up must be from 1 to {MAX_DEQUANTIZE_RANK}, got {pair[2]}")
        return (self.vector(name, vector), *pair)

    def _matrix(self, name: str, tensor: Tensor, shape: tuple[int, int]) -> tuple[Any, int, int, int]:
        _check_type(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape[0]}x{shape[1]}, got {tuple(tensor.shape)}")
        self.add(name, tensor)
        return (tensor, tensor.stride(0), tensor.stride(1), _DTYPES[tensor.dtype])


def _check_type(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
