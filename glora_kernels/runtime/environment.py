"""Every environment variable and capability probe of the package; each is read when needed, never at import."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

import torch

TABLES_VARIABLE = "GLORA_KERNELS_TABLES"
"""The environment variable with the folder of this user's measured tables (`tables_directory`)."""

LAUNCH_VARIABLE = "GLORA_KERNELS_LAUNCH"
"""The environment variable that turns cached launches off when it is "slow"."""


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1, set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def launches_slowly() -> bool:
    """Whether every call plans its launches again, with no cache (GLORA_KERNELS_LAUNCH=slow)."""
    return os.environ.get(LAUNCH_VARIABLE) == "slow"


def has_triton() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def triton_cache() -> str:
    """The folder in which Triton keeps what it compiles: TRITON_CACHE_DIR, or ~/.triton/cache."""
    from triton import knobs

    return str(knobs.cache.dir)


def require_triton() -> None:
    """Check, before the kernels are imported, that they can be.

    Raises:
        RuntimeError: triton is not installed, or was imported before TRITON_INTERPRET was set.
    """
    if not has_triton():
        raise RuntimeError("the Triton kernels need the triton package: pip install triton, or use backend('eager')")
    import triton.language as tl

    if interpreting() != (type(tl.zeros).__name__ == "InterpretedFunction"):
        raise RuntimeError(
            "TRITON_INTERPRET was changed after triton was imported, which leaves half of it interpreted; "
            "set it before Python starts"
        )


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now goes into a CUDA graph."""
    # A fake CUDA tensor may come without a GPU, where asking about capture is an error.
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def allow_tf32() -> bool:
    """Whether fp32 products may use TF32, by PyTorch's own switch for matrix products."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def arch(device_index: int) -> str:
    """The architecture of a GPU as the configuration tables name it: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device_index: int) -> int:
    """The number of a GPU's multiprocessors: 132 on an H100 SXM, 114 on an H100 PCIe."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def stream_of(device: torch.device) -> int:
    """The handle of the current stream of a device; 0 on the host."""
    return int(torch._C._cuda_getCurrentRawStream(device.index or 0)) if device.type == "cuda" else 0


def gpus() -> list[str]:
    """One line per GPU: name, architecture and memory."""
    lines = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"{properties.name}, {arch(i)}, {properties.total_memory / 2**30:.0f} GiB")
    return lines


@functools.cache
def device_name(index: int) -> str:
    """The name of a GPU as its driver gives it: "NVIDIA H100 80GB HBM3"."""
    return str(torch.cuda.get_device_properties(index).name)


def device_of(architecture: str) -> str | None:
    """The name of this machine's first GPU of that architecture, or None."""
    indices = (i for i in range(torch.cuda.device_count()) if arch(i) == architecture)
    return next((device_name(i) for i in indices), None)


def l2_bytes(index: int) -> int:
    """The size of a GPU's L2 cache; 50 MiB where PyTorch does not report it."""
    return int(getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0)) or 50 << 20


def slug(name: str) -> str:
    """The name of a device in the form of a file name: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tables_directory() -> Path:
    """The folder where `python -m glora_kernels tune` puts tables (<device>.json) and launches look for them.

    GLORA_KERNELS_TABLES names it; where that is unset or empty, it is ~/.cache/glora_kernels.
    """
    # Path.expanduser would raise where there is no home directory.
    return Path(os.path.expanduser(os.environ.get(TABLES_VARIABLE) or "~/.cache/glora_kernels"))


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
