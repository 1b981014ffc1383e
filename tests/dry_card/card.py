"""The stand-in card in this process, installed by importing this before torch: see the package's docstring."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from dry_card import build

assert "torch" not in sys.modules, "the dry card is installed before torch is imported"
os.environ.pop("TRITON_INTERPRET", None)
# Where they are built for CUDA, they launch through its own runtime, and that takes no stand-in for a driver.
sys.modules["glora_kernels._C"] = sys.modules["bitsandbytes"] = None  # type: ignore[assignment]

_FOLDER = build.built()
os.environ["TRITON_LIBCUDA_PATH"] = str(_FOLDER)
_driver = ctypes.CDLL(str(_FOLDER / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
# PyTorch asks once, while it is imported, whether there is CUDA: its libraries and the device come first.
_libraries = build.package("torch") / "lib"
for _name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so"):
    ctypes.CDLL(str(_libraries / _name), mode=ctypes.RTLD_GLOBAL)
_spec = importlib.util.spec_from_file_location("dry_device", _FOLDER / "dry_device.so")
device: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(device)


# ---- torch.cuda: its own Python over what a CUDA build would have in torch._C


class _Stream:
    def __new__(cls, priority=0, stream_id=None, device_index=None, device_type=1, stream_ptr=None):
        self = object.__new__(cls)
        self.device_index = device.device() if device_index is None else device_index
        self.stream_id = device.new_stream() if stream_id is None else stream_id
        self.device_type = 1
        self.cuda_stream = device.handle(self.device_index, self.stream_id)
        return self

    @property
    def device(self):
        return torch.device("cuda", self.device_index)

    def query(self):
        return True

    def synchronize(self):
        device.host_waits("synchronize")

    def __eq__(self, other):
        return (self.stream_id, self.device_index) == (other.stream_id, other.device_index)


class _Event:
    def __new__(cls, **options):
        return object.__new__(cls)

    def record(self, stream):
        pass

    def wait(self, stream):
        pass

    def query(self):
        return True

    def elapsed_time(self, end):
        return 1.0

    def synchronize(self):
        device.host_waits("synchronize")


class _Graph:
    """A graph that captures nothing: what is asked while a stream captures is what counts."""

    def __new__(cls, keep_graph=False):
        return object.__new__(cls)

    def capture_begin(self, pool=None, capture_error_mode="global"):
        device.set_capturing(True)

    def capture_end(self):
        device.set_capturing(False)

    def instantiate(self):
        pass

    def replay(self):
        pass

    def reset(self):
        pass

    def pool(self):
        return (0, 1)


def _exchange(index: int) -> int:
    before = device.device()
    if index >= 0:
        device.set_device(index)
    return before


_C = {
    "_CudaStreamBase": _Stream,
    "_CudaEventBase": _Event,
    "_CUDAGraph": _Graph,
    "_graph_pool_handle": lambda: (0, 1),
    "_cuda_init": lambda: None,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDeviceCount": lambda: device.DEVICES,
    "_cuda_getDevice": device.device,
    "_cuda_setDevice": device.set_device,
    "_cuda_exchangeDevice": _exchange,
    "_cuda_maybeExchangeDevice": _exchange,
    "_cuda_getCurrentRawStream": device.raw_stream,
    "_cuda_getCurrentStream": lambda index: (device.stream(index), index, 1),
    "_cuda_getDefaultStream": lambda index: (0, index, 1),
    "_cuda_setStream": lambda stream_id, device_index, device_type: device.set_stream(device_index, stream_id),
    "_cuda_isCurrentStreamCapturing": device.is_capturing,
    "_cuda_synchronize": lambda: device.host_waits("synchronize"),
    "_cuda_set_sync_debug_mode": device.set_sync_debug_mode,
    "_cuda_get_sync_debug_mode": device.sync_debug_mode,
    "_cuda_emptyCache": lambda: None,
    "_host_emptyCache": lambda: None,
}


class _BeforeTorchCuda(importlib.abc.MetaPathFinder):
    """Fills torch._C when it is there and torch.cuda, which builds on it, is not."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.cuda":
            sys.meta_path.remove(self)
            for key, value in _C.items():
                setattr(sys.modules["torch._C"], key, value)


sys.meta_path.insert(0, _BeforeTorchCuda())
import torch  # noqa: E402

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    L2_cache_size=50 << 20, shared_memory_per_block_optin=232448, warp_size=32, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)  # fmt: skip
for _name, _value in {
    "_initialized": True,
    "get_device_properties": lambda which=None: PROPERTIES,
    "get_device_capability": lambda which=None: (9, 0),
    "get_device_name": lambda which=None: PROPERTIES.name,
    "mem_get_info": lambda which=None: (2 << 30, 80 << 30),  # memory is the host's
    "is_bf16_supported": lambda *a, **k: True,
    "memory_allocated": lambda which=None: device.held(),
    "max_memory_allocated": lambda which=None: device.peak(),
    "reset_peak_memory_stats": lambda which=None: device.reset_peak(),
    "default_generators": (torch.default_generator,) * device.DEVICES,
}.items():
    setattr(torch.cuda, _name, _value)
torch._C._has_cuda = True


# ---- The log


class _Function(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 256), ("registers", ctypes.c_int32), ("local_bytes", ctypes.c_int32),
        ("device", ctypes.c_int32), ("parameters", ctypes.c_int32), ("offsets", ctypes.c_uint16 * 512),
        ("sizes", ctypes.c_uint16 * 512), ("parameter_bytes", ctypes.c_int32), ("dynamic_shared", ctypes.c_int32),
        ("image", ctypes.c_void_p), ("image_bytes", ctypes.c_uint64),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.POINTER(_Function)), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32), ("cluster", ctypes.c_uint32), ("dependent", ctypes.c_uint32),
        ("cooperative", ctypes.c_uint32), ("device", ctypes.c_int32), ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p),
    ]  # fmt: skip


for _name in ("dry_launches", "dry_modules", "dry_maps", "dry_logged"):
    getattr(_driver, _name).restype = ctypes.c_uint64
_driver.dry_entry.restype = ctypes.POINTER(_Launch)
_driver.dry_entry.argtypes = [ctypes.c_uint64]


@dataclass(frozen=True)
class Launch:
    """What the card was given. `parameters`: the bytes of each, in order; a tensor map begins with its address."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    cluster: int
    dependent: bool
    cooperative: bool
    device: int
    stream: int
    registers: int
    local_bytes: int
    parameters: tuple[bytes, ...]
    function: int

    def addresses(self) -> list[int]:
        """What may be pointers among the parameters, and the addresses in its tensor maps."""
        return [int.from_bytes(p[:8], "little") for p in self.parameters if len(p) in (8, 128)]

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter points into a tensor."""
        start = tensor.data_ptr()
        return any(start <= address < start + tensor.nbytes for address in self.addresses())

    def machine_code(self) -> bytes:
        function = ctypes.cast(self.function, ctypes.POINTER(_Function)).contents
        return ctypes.string_at(function.image, function.image_bytes)


def _read(index: int) -> Launch:
    entry = _driver.dry_entry(index).contents
    f = entry.function.contents
    parameters = tuple(
        ctypes.string_at(entry.parameters + f.offsets[i], f.sizes[i]) for i in range(f.parameters)
    )  # fmt: skip
    return Launch(
        f.name.decode(), tuple(entry.grid), entry.threads, entry.shared, entry.cluster, bool(entry.dependent),
        bool(entry.cooperative), entry.device, entry.stream, f.registers, f.local_bytes, parameters,
        ctypes.addressof(f),
    )  # fmt: skip


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of every thread inside, filled in at the end."""
    found: list[Launch] = []
    first = _driver.dry_logged()
    yield found
    found += map(_read, range(first, _driver.dry_logged()))


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, launches are counted and nothing else: for clocks."""
    _driver.dry_record(0)
    try:
        yield
    finally:
        _driver.dry_record(1)


def launches() -> int:
    """Of the process so far."""
    return _driver.dry_launches()


def modules() -> int:
    """Loaded so far: what the process compiled, or took from Triton's cache."""
    return _driver.dry_modules()


def tensor_maps() -> int:
    """Made so far. One against the rules is refused where it is made."""
    return _driver.dry_maps()


def waits() -> int:
    """How often the host has waited for the card: synchronised, copied or read a number."""
    return device.waits()


def leave(code: int = 0) -> NoReturn:
    """Ends the process at once: autograd's threads of a device do not survive the interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def fresh_addresses() -> Iterator[None]:
    """Inside, freed memory is not used again: an address that was kept shows, as it points to what was freed."""
    device.set_reuse(False)
    try:
        yield
    finally:
        device.set_reuse(True)


# ---- Triton


class Compilations(list):
    """The kernels that the JIT asks to be compiled, by name and key, each once."""

    def __init__(self, compiles: bool):
        self.compiles = compiles
        self.keys: set[tuple[str, str]] = set()

    def hook(self, *, key, fn, **_):
        if (fn.name, str(key)) not in self.keys:
            self.keys.add((fn.name, str(key)))
            self.append(fn.name)
        return not self.compiles


@contextlib.contextmanager
def compilations(compiles: bool = True) -> Iterator[Compilations]:
    """What is asked to be compiled inside. Without `compiles` nothing is, and what was not compiled is not launched."""
    found = Compilations(compiles)
    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, found.hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402

triton.runtime.driver.set_active(CudaDriver())
