"""Run in a process of its own: python load_hub.py HUB. Loads the kernel laid out in HUB as `kernels.get_kernel` does.

By the `kernels` package where it is installed, else with the two steps that it takes. Then by its own package, beside.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch


def load(hub: Path) -> Any:
    try:
        import kernels
    except ImportError:
        build = hub / "build" / "torch-cpu"
        name = json.loads((build / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert len(Build.open(hub).general.backends) == 3
    for build in (hub / "build").iterdir():
        metadata = Metadata.read_from_file(build / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
    return kernels.get_local_kernel(hub)


def step(ops: Any, weight: Any, **how: Any) -> list[torch.Tensor]:
    """y and the gradients of a LoRA layer with a vector A."""
    torch.manual_seed(0)
    x, a = torch.randn(9, 64, requires_grad=True), (torch.randn(32) * 0.1).requires_grad_()
    up, down = torch.randn(32, 4, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    y = ops.glora_linear(x, weight, None, a=a, b_up=up, b_down=down, scale=2.0)
    y.square().sum().backward()
    return [y.detach(), x.grad, a.grad, up.grad, down.grad]


hub = load(Path(sys.argv[1]))
assert "glora_kernels" not in sys.modules, "it is a copy that needs no installed package"
torch.manual_seed(1)
weight = torch.randn(32, 64)
codes = hub.quantize_weight(weight, "nf4")
eager = [*step(hub, weight), *step(hub, codes)]
with hub.backend("triton"):
    interpreted = [*step(hub, weight), *step(hub, codes)]
for ours, theirs in zip(interpreted, eager, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

import glora_kernels.ops  # noqa: E402
from glora_kernels.quant import quantize_weight  # noqa: E402

for ours, theirs in zip(
    [*step(glora_kernels.ops, weight), *step(glora_kernels.ops, quantize_weight(weight, "nf4"))], eager, strict=True
):
    assert torch.equal(ours, theirs)
assert hasattr(torch.ops, hub.__name__)
assert getattr(torch.ops, hub.__name__).glora_linear is not torch.ops.glora_kernels.glora_linear
compiled = torch.compile(lambda x: hub.glora_linear(x, weight, None), fullgraph=True, backend="aot_eager")
x = torch.randn(5, 64)
torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, weight))
print("loaded", hub.__name__)
