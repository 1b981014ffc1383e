"""Which release of PEFT the integrations are made for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PEFT = "0.20"
"""The lowest release: the first with GLoRA and HiRA."""


def need_peft(who: str) -> None:
    """An ImportError where PEFT is missing, or older than `PEFT`; `who` is what needs it."""
    try:
        found = version("peft")
    except PackageNotFoundError as error:
        raise ImportError(f"{who} needs PEFT, which is not installed: pip install 'peft>={PEFT}'") from error
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, PEFT.split("."))):
        raise ImportError(f"{who} needs PEFT {PEFT} or later; installed is {found}")
