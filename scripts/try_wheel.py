"""Uses an installed wheel as a user would: python try_wheel.py ENVIRONMENT built|missing [--alone], from any folder.

Checks that the package is the one of the environment, that its files are there, that `info` says whether the CUDA
extension is built, and that a layer computes and trains on the CPU. --alone, where there is no torch: that the CUDA
extension loads.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(environment: Path, expected: str, alone: bool) -> None:
    spec = importlib.util.find_spec("glora_kernels")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).resolve().parent
    assert folder.is_relative_to(environment.resolve()), f"{folder} is not in {environment}"
    assert not (folder.parent / "csrc").exists()
    assert not (folder.parent / "tests").exists()
    for name in ("py.typed", "runtime/direct.c", "runtime/shipped/README.md"):
        assert (folder / name).is_file(), name
    modules = list(folder.glob("_C.*"))
    assert len(modules) == (expected == "built"), modules
    if alone:
        print(f"Python {sys.version.split()[0]} loads it: {loaded(modules[0]).build_info()}")
    else:
        use(expected)


def loaded(path: Path) -> Any:
    """The CUDA extension of this file."""
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(expected: str) -> None:
    """Ask `info`, and compute with a layer, dense and in 4 bits."""
    import torch

    import glora_kernels as gk
    from glora_kernels.runtime import extension

    why = extension.why_missing()
    assert (why is None) == (expected == "built"), why
    assert why is None or "GLORA_KERNELS_CUDA=0" in why
    command = [sys.executable, "-m", "glora_kernels", "info", "--json"]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert told["versions"]["glora_kernels"] == gk.__version__
    assert ("built for" in told["built"]["CUDA extension"]) == (expected == "built")

    linear = torch.nn.Linear(48, 32)
    layer = gk.GLoRALinear.from_linear(linear, gk.GLoRAConfig(A="vector", B="lora", C="vector", rank=4))
    x = torch.randn(5, 48, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, linear(x))
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter().values())
    codes = gk.quantize(torch.nn.Linear(64, 32))
    assert torch.isfinite(gk.GLoRALinear.from_linear(codes, gk.GLoRAConfig.lora(4))(torch.randn(2, 64))).all()
    print(f"glora_kernels {gk.__version__} with torch {torch.__version__}: works, the CUDA extension is {expected}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "--alone" in sys.argv)
