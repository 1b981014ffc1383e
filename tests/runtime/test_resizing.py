"""A program planned once for a class of M gives, for any M of the class, what planning for that M would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.recording import Recording
from glora_kernels.runtime.sizes import Rows, at, lesser
from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools import planned
from glora_kernels.tools.planned import How, Linear

V = "vector"
FORMS = {
    "lora": GLoRAConfig.lora(rank=16, alpha=32.0),
    "large rank, dropout": GLoRAConfig.lora(rank=96, alpha=32.0, dropout=0.1),
    "vectors": GLoRAConfig(V, "lora", V, V, V, 16),
    "A=B=vector": GLoRAConfig(V, V, "none", "none", "none", 16),
    "constants": GLoRAConfig("constant", "constant", V, "constant", "constant", 16),
    "A=B=C=lora": GLoRAConfig("lora", "lora", "lora", V, V, 16),
    "product": GLoRAConfig("lora", "lora", "none", "none", "none", 16, variant="matmul"),
}
ROWS = (1, 2, 16, 17, 33, 64, 65, 300, 512, 700, 2047, 2049, 4095, 8191, 16384)


def numbers(value: Any, m: int) -> list[Any]:
    """The integers in an argument, for M; tensors by their kind alone."""
    if isinstance(value, torch.Tensor):
        return [value.dtype]
    if isinstance(value, tuple):
        return [number for part in value for number in numbers(part, m)]
    if hasattr(value, "block_shape"):
        return [*(at(size, m) for size in value.shape), *value.strides, *value.block_shape]
    return [int(at(value, m))] if isinstance(value, int) else [str(value)]


def described(recording: Recording, m: int) -> list[Any]:
    """What the steps and the memory of a recording come to for M."""
    launches = [
        (
            step.kernel.__name__,
            tuple(int(at(size, m)) for size in step.grid),
            {name: numbers(value, m) for name, value in step.args.items()},
            step.options,
        )
        if isinstance(step, Launch)
        else type(step).__name__
        for step in recording.steps
    ]
    made = [(tuple(int(at(size, m)) for size in one.shape), one.dtype, one.is_zero) for one in recording.made]
    return [*launches, *made]


def recordings(monkeypatch: pytest.MonkeyPatch, call: Any, m: int, exact: bool) -> list[list[Any]]:
    """Both passes of a call of M rows, planned for its class, or `exact`ly for it."""
    found: list[Recording] = []
    original = Recording.__init__

    def noted(self: Recording, tensors: Any, with_rows: Any, rows: int) -> None:
        original(self, tensors, with_rows, m if exact else rows)
        found.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "__init__", noted)
        call()
    return [described(recording, m) for recording in found]


@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize("name", FORMS)
def test_layers(name, arch, monkeypatch):
    for n, k in ((4096, 4096), (1024, 4096), (130, 300)):
        for m in ROWS:
            layer = Linear(FORMS[name], n, k, bias=True)

            def call(layer=layer, m=m):
                planned.linear(layer, How(m, torch.bfloat16, arch))

            assert recordings(monkeypatch, call, m, False) == recordings(monkeypatch, call, m, True), (n, k, m)


@pytest.mark.parametrize("kind", ["q/k/v", "ragged", "4-bit", "fp32 adapters"])
def test_groups_and_four_bits(kind, monkeypatch):
    lora = FORMS["lora"]
    for m in ROWS:
        how = How(m, torch.bfloat16, "sm_90")

        def call(how=how):
            if kind == "q/k/v":
                planned.group([Linear(lora, n, 4096) for n in (4096, 1024, 1024)], how)
            elif kind == "ragged":
                planned.group([Linear(FORMS["large rank, dropout"], n, 72) for n in (40, 24)], how)
            elif kind == "4-bit":
                planned.linear(Linear(lora, 4096, 4096, quant_type="nf4", nested=True), how)
            else:
                planned.linear(Linear(lora, 4096, 4096, adapter=torch.float32), how)

        assert recordings(monkeypatch, call, m, False) == recordings(monkeypatch, call, m, True), m


def test_a_class_is_stood_for_by_one_of_its_own():
    for m in range(1, 9000):
        assert configs.representative(configs.representative(m)) == configs.representative(m)
        assert configs.m_class(configs.representative(m)) == configs.m_class(m)


def test_numbers_follow():
    m = Rows(512)
    made = {
        "a sum": (m + 3, lambda m: m + 3),
        "a difference": (m - 5, lambda m: m - 5),
        "a product": (m * 6, lambda m: m * 6),
        "tiles": (-(-m // 64) * 7, lambda m: -(-m // 64) * 7),
        "at most": (lesser(m // 8, 132), lambda m: min(m // 8, 132)),
    }
    for name, (number, truth) in made.items():
        for other in (1, 63, 64, 1000, 4097):
            assert at(number, other) == truth(other), name
    assert (m * 32).multiple == 16
    assert (m * 8 + 4).multiple == 4
    assert m.is_m
    assert not (m + 1).is_m


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", FORMS)
def test_descriptors_have_the_tile_of_their_kernel(name, arch):
    """Rows of 264 numbers begin at multiples of 16 bytes, but not of 32: they come by descriptors all the same."""
    seen = 0
    for (n, k), m in ((shape, m) for shape in ((4096, 4096), (272, 264), (264, 4096)) for m in (33, 130, 700, 4096)):
        steps = planned.linear(Linear(FORMS[name], n, k, bias=True), How(m, torch.bfloat16, arch))
        for step in (*steps.forward, *steps.backward):
            if not isinstance(step, Launch) or step.kernel.__name__ not in ("_glora_fwd_kernel", "_glora_dx_kernel"):
                continue
            args, forward = step.args, step.kernel.__name__ == "_glora_fwd_kernel"
            left, out = (args["x"], args["y"]) if forward else (args["dy"], args["dx"])
            assert hasattr(left, "block_shape"), (n, k, m)
            depth, cols = (args["BLOCK_K"], args["BLOCK_N"]) if forward else (args["BLOCK_N"], args["BLOCK_K"])
            assert left.block_shape == [args["BLOCK_M"], depth]
            assert sorted(args["w"].block_shape) == sorted([cols, depth])
            assert out.block_shape == [args["BLOCK_M"], cols // args["PARTS"]]
            seen += 1
    assert seen
