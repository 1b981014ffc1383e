"""Launches a program's kernels from C (`direct.c`), with no Python between the launches, and describes them to it.

`direct.c` is compiled at first use, as Triton compiles its own launcher (`triton.runtime.build`), and kept in Triton's
cache. A launch is described once, from the kernel that Triton compiled: every parameter of the machine code is a
constant, an address, a number that follows M, a number read from a CPU tensor, or a tensor map.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.recording import Place
from glora_kernels.runtime.sizes import HostValue, Rows

_CONSTANT, _POINTER, _SIZE, _HOST_VALUE, _TENSOR_MAP = range(5)
_FLOATS = {"fp32": "f", "f32": "f", "fp64": "d"}


@functools.cache
def module() -> Any:
    """The module compiled from `direct.c`.

    Raises:
        ImportError: there is no libcuda here.
    """
    import triton.backends.nvidia as nvidia
    from triton.runtime.build import compile_module_from_src

    source, include = Path(__file__).with_suffix(".c").read_text(), Path(str(nvidia.__file__)).parent / "include"
    return compile_module_from_src(source, "glora_kernels_direct", include_dirs=[str(include)])


def forms(tensors: Sequence[Tensor | None], flags: bytes, on_gpu: bool) -> Hashable:
    """The cache key of a call's tensors: class, dtype, sizes, strides, device and address modulo 16 of each.

    Args:
        tensors: of the call. One with a row per token and more than two dimensions is contiguous.
        flags: for each tensor 1 if it has a row per token; its number of rows is then no part of the key.
        on_gpu: whether the call may be launched from C; the key is then made in C as well.

    Raises:
        IndexError, RuntimeError: a tensor has no strides or address, or one with a row per token has no dimensions.
    """
    return _forms_in_c()(tensors, flags) if on_gpu else forms_of(tensors, flags)


def forms_of(tensors: Sequence[Tensor | None], flags: bytes) -> Hashable:
    """`forms` in Python, which takes six times as long."""
    return tuple([
        None if t is None
        else (t.__class__, t.dtype, t.shape[-1], t.stride() if t.ndim < 3 else None, t.data_ptr() & 15, t.device)
        if i < len(flags) and flags[i]
        else (t.__class__, t.dtype, t.shape, t.is_contiguous() or t.stride(), t.data_ptr() & 15, t.device)
        for i, t in enumerate(tensors)
    ])  # fmt: skip


@functools.cache
def _forms_in_c() -> Callable[[Sequence[Tensor | None], bytes], Hashable]:
    if torch.version.hip:
        return forms_of
    try:
        return module().forms
    except Exception:  # no Triton, compiler or libcuda: a launch raises that error, and the eager path needs none
        return forms_of


class Unsuited(Exception):
    """The launch cannot be made from C; Triton's own launcher must make it."""


class Sizes:
    """The numbers of a pass that follow M; a description refers to each by its index."""

    def __init__(self) -> None:
        self.numbers: list[Rows] = []

    def number(self, value: int) -> tuple[int, bool]:
        if not isinstance(value, Rows):
            return int(value), False
        self.numbers.append(value)
        return len(self.numbers) - 1, True

    def pack(self, m: int) -> bytes:
        return struct.pack(f"{len(self.numbers)}q", *(number.of(m) for number in self.numbers))


def describe(launch: Launch, compiled: Any, sizes: Sizes, place_of: Callable[[Tensor], Place]) -> tuple[Any, ...]:
    """The description of a launch that `module().prepare` takes.

    Args:
        launch: a recorded launch.
        compiled: the kernel that Triton compiled for it.
        sizes: those of the pass; the launch's are added.
        place_of: gives the place of a recorded tensor.

    Raises:
        Unsuited: it needs what `direct.c` lacks: scratch memory for the compiler, clusters, cooperative grids.
    """
    if not hasattr(compiled, "metadata"):
        raise Unsuited("a kernel of another kind than Triton's own")
    compiled._init_handles()
    meta = compiled.metadata
    if (
        meta.global_scratch_size
        or meta.profile_scratch_size
        or meta.num_ctas != 1
        or meta.launch_cooperative_grid
        or meta.launch_pdl
    ):
        raise Unsuited(f"{meta.name} needs what only Triton's launcher gives")
    maps = iter(getattr(meta, "tensordesc_meta", None) or ())
    params: list[tuple[Any, ...]] = []
    for name, kind in compiled.src.signature.items():
        for leaf, value in _leaves(kind, launch.args[name]):
            params += _parameters(leaf, value, maps, sizes, place_of)
    params += [(_CONSTANT, 8, 0, (0, False), bytes(8), None)] * 2  # scratch memory for the compiler: none
    grid = tuple(sizes.number(size) for size in (*launch.grid, 1, 1)[:3])
    return int(compiled.function), 32 * meta.num_warps, meta.shared, grid, tuple(params)


def _leaves(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The (type, value) of each machine-code argument that one argument of a kernel becomes."""
    if isinstance(kind, tuple):
        for inner, part in zip(kind, value, strict=True):
            yield from _leaves(inner, part)
    elif kind != "constexpr":
        yield kind, value


def _parameters(
    kind: str, value: Any, maps: Iterator[Any], sizes: Sizes, place_of: Callable[[Tensor], Place]
) -> list[tuple[Any, ...]]:
    """The parameters for one machine-code argument: (kind, bytes, slot, offset or number, constant, map) each."""
    if kind.startswith("tensordesc"):
        return _map(value, next(maps, None), sizes, place_of)
    if kind.startswith("*"):
        place = place_of(value)
        return [(_POINTER, 8, place.slot, sizes.number(place.offset), b"", None)]
    if kind in _FLOATS:
        return [_constant(struct.pack(_FLOATS[kind], value))]
    bits = re.fullmatch(r"[iu](\d+)", kind)
    if bits is None:
        raise Unsuited(f"a parameter of type {kind}")
    size = max(1, int(bits.group(1)) // 8)
    return [_integer(value, size, sizes)]


def _integer(value: int, size: int, sizes: Sizes) -> tuple[Any, ...]:
    if isinstance(value, HostValue):
        return (_HOST_VALUE, 8, value.slot, (0, False), b"", None)
    if isinstance(value, Rows):
        return (_SIZE, size, 0, sizes.number(value), b"", None)
    return _constant((int(value) & (1 << 8 * size) - 1).to_bytes(size, "little"))


def _constant(value: bytes) -> tuple[Any, ...]:
    return (_CONSTANT, len(value), 0, (0, False), value, None)


def _map(value: Any, meta: Any, sizes: Sizes, place_of: Callable[[Tensor], Place]) -> list[tuple[Any, ...]]:
    """The parameters of a tensor descriptor: the tensor map, then its sizes and strides."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if meta is None or meta["fp4_padded"] or value.padding == "nan" or getattr(value, "round_f32_to_tf32", False):
        raise Unsuited("a tensor descriptor that is no plain map")
    place, strides = place_of(value.base), [int(stride) for stride in value.strides]
    described = (
        meta["swizzle"],
        TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
        tuple(meta["block_size"]),
        tuple(sizes.number(size) for size in value.shape),
        tuple((stride * meta["elem_size"], False) for stride in strides),
    )
    head = (_TENSOR_MAP, 128, place.slot, sizes.number(place.offset), b"", described)
    shape = [_integer(size, 4, sizes) for size in value.shape]
    return [head, *shape, *(_integer(stride, 8, sizes) for stride in strides)]
