"""The releases of PEFT that the integrations support."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

PEFT, NEWEST = "0.20", "0.21"
"""The oldest release supported, the first with GLoRA and HiRA, and the newest that was tested."""


def need_peft(who: str) -> None:
    """Raise an ImportError where PEFT is missing or older than `PEFT`; warn where it is newer than `NEWEST`.

    The layers of a newer release may compute something else under the same names. who: the caller, for the message.
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
