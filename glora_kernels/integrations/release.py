"""Which releases of PEFT the integrations are made for."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

PEFT, NEWEST = "0.20", "0.21"
"""The lowest release, which is the first with GLoRA and HiRA, and the newest that was tested."""


def need_peft(who: str) -> None:
    """An ImportError where PEFT is missing or older than `PEFT`, a warning where it is newer than `NEWEST`.

    `who` is what needs it. A newer release may have layers that compute something else under the same names.
    """
    try:
        found = version("peft")
    except PackageNotFoundError as error:
        raise ImportError(f"{who} needs PEFT, which is not installed: pip install 'peft>={PEFT}'") from error
    release = _numbers(found)
    if release < _numbers(PEFT):
        raise ImportError(f"{who} needs PEFT {PEFT} or later; installed is {found}")
    if release > _numbers(NEWEST):
        warnings.warn(
            f"{who} was tested with PEFT {PEFT} to {NEWEST}; installed is {found}: compare a forward of your model "
            "with and without it",
            UserWarning,
            stacklevel=4,  # who called accelerate
        )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")[:2]))
