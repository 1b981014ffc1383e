"""torchvision from a folder of its own, for a process that needs timm."""

from __future__ import annotations

import importlib
import os
import sys

FOLDER = os.environ.get("GLORA_KERNELS_TIMM")
"""The folder with timm and torchvision (`scripts/setup.sh` makes it): they cannot stand beside a CPU build of torch."""


def import_torchvision() -> None:
    """torchvision from that folder, its operators left out, and timm to be imported from there.

    The build that the package index has does not fit a CPU build of torch: importing it stops where it describes an
    operator that is not there. timm does not call them.
    """
    import torch

    sys.path.append(str(FOLDER))
    real = torch.library.register_fake

    def register_fake(name: str, *args: object, **kwargs: object) -> object:
        return (lambda function: function) if str(name).startswith("torchvision::") else real(name, *args, **kwargs)

    torch.library.register_fake = register_fake
    importlib.import_module("torchvision")
    torch.library.register_fake = real
