"""Every environment variable and capability probe of the package, each asked when needed and never at import."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1, set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_triton() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def require_triton() -> None:
    """Called before the kernels are loaded.

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


def allow_tf32() -> bool:
    """Whether fp32 products may use TF32: PyTorch's own switch for matrix products decides."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def arch(device_index: int) -> str:
    """The architecture of a GPU as the configuration tables name it: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def gpus() -> list[str]:
    """One line a GPU: its name, architecture and memory."""
    lines = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"{properties.name}, {arch(i)}, {properties.total_memory / 2**30:.0f} GiB")
    return lines
