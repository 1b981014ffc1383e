"""The compiled CUDA extension: whether it is usable, why not, and for which architectures. Loaded on first use."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType

_RECORD = "_C_missing.txt"
"""The file in which setup.py records why it did not build the extension."""


def available(arch: str | None = None) -> bool:
    """Whether the extension is there and, with `arch` ("sm_90"), runs on a card of that architecture."""
    return why_missing(arch) is None


def why_missing(arch: str | None = None) -> str | None:
    """Why the CUDA extension cannot be used (with `arch`: on a card of that architecture), or None where it can."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if arch is None:
        return None
    archs, (driver, runtime) = build_info()["archs"], loaded.versions()
    code = runs_on(arch, archs)
    if code is None:
        return f"the CUDA extension was built for sm_{', sm_'.join(archs)}, the card is {arch}"
    # Machine code needs a driver of the runtime's major version or later; PTX one of its minor version as well.
    needed = runtime // 1000 * 1000 if code == "machine code" else runtime
    if driver == 0 or driver >= needed:  # 0: there is no driver
        return None
    have, want = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, needed))
    return f"the CUDA extension needs a driver for CUDA {want}, this one serves up to {have}"


def build_info() -> dict[str, str | tuple[str, ...]]:
    """archs: the architectures of the machine code ("80", "90", "100"); nvcc: the version of the compiler.

    Raises:
        RuntimeError: the extension is missing.
    """
    info = module().build_info()
    return {"archs": tuple(info["archs"].split(";")), "nvcc": info["nvcc"]}


def module() -> ModuleType:
    """The extension module, glora_kernels._C.

    Raises:
        RuntimeError: it is missing; the message says why.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def runs_on(arch: str, built: str | tuple[str, ...]) -> str | None:
    """What a card ("sm_89") runs of code built for these architectures: "machine code", "PTX" of the newest, or None.

    Machine code runs on cards of its major version and of its minor version or later ("90a": on sm_90 alone); PTX also
    on all later cards.
    """
    match = re.fullmatch(r"sm_(\d+)", arch)
    if match is None:
        return None
    card = int(match[1])
    exact = {int(name.rstrip("af")) for name in built if name[-1] in "af"}
    plain = {int(name) for name in built if name[-1] not in "af"}
    if card in exact or any(card // 10 == code // 10 and card >= code for code in plain):
        return "machine code"
    newest = max(plain | exact)
    return "PTX" if newest in plain and card >= newest else None


@functools.cache
def _load() -> ModuleType | str:
    """The module, or the reason why there is none. Importing it touches no device."""
    try:
        return importlib.import_module(".._C", __package__)
    except ModuleNotFoundError:
        package = Path(__file__).parent.parent
        record, why = package / _RECORD, "the package was installed without building it"
        if record.exists():
            why = record.read_text().strip()
        elif (package.parent / "setup.py").exists():
            why = (
                f"this is the source tree {package.parent}, and not an installed package, which Python finds elsewhere"
            )
        return f"the CUDA extension is missing: {why}; reinstall where nvcc is, or use backend('triton')"
    except ImportError as error:
        return f"the CUDA extension does not load: {error}"
