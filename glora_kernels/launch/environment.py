"""Every environment variable and capability probe of the package, each asked when needed and never at import."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1, set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernels_imported() -> bool:
    """Whether the Triton kernels are already loaded, after which TRITON_INTERPRET has no effect on them."""
    return "glora_kernels.kernels" in sys.modules


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether the triton package can be imported; looked up once."""
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def allow_tf32() -> bool:
    """Whether fp32 products may use TF32: PyTorch's own switch for matrix products decides."""
    return torch.backends.cuda.matmul.allow_tf32


@functools.cache
def arch(device_index: int) -> str:
    """The architecture of a GPU as the configuration tables name it: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
