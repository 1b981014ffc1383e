"""What the card is given by a layer's call: how many launches, and what their machine code is like."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

COUNTS = {
    "LoRA": (2, 4),
    "LoRA, dropout": (2, 4),
    "A=vector B=lora C=D=E=vector": (3, 6),
    "A=B=lora": (2, 4),
    "product variant": (2, 6),
    "q/k/v fused": (1, 4),
    "PEFT, accelerated": (2, 4),
    "NF4": (3, 5),
    "decode": (2, 0),
    "decode, NF4": (1, 0),
}
"""Launches forward and backward; nothing else runs on the card."""
SHARES = [["LoRA", "LoRA, dropout", "PEFT, accelerated", "decode"],
          ["A=vector B=lora C=D=E=vector", "NF4", "decode, NF4"],
          ["A=B=lora", "product variant", "q/k/v fused"]]  # fmt: skip
"""What a process compiles and runs."""
STREAMING = ("prepare", "dy", "x", "grouped_dy", "grouped_x")
"""Passes that read x, dy or W once, from end to end."""


def disassembled(machine_code: bytes) -> str:
    from triton import backends

    tool = Path(next(iter(backends.__path__)), "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        return subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout


def loads(text: str) -> dict[str, int]:
    """How often machine code loads from memory, by width in bits: {"LDG.U16": 48, "LDGSTS.128": 12}; LDG is of 32."""
    found: Counter[str] = Counter()
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG)((?:\.\w+)*)", text):
        width = re.search(r"\.([US]8|[US]16|64|128)\b", modifiers)
        found[f"{name}.{width[1]}" if width else name] += 1
    return dict(found)


def launched(names: list[str]) -> dict[str, Any]:
    """Of each form, what a call launches forward and backward."""
    import torch

    from dry_card import card, forms

    def shown(log: list[card.Launch]) -> list[dict[str, Any]]:
        return [
            {
                "name": e.name.removeprefix("_").removesuffix("_kernel"),
                "local": e.local_bytes,
                "loads": loads(disassembled(e.machine_code())),
                "maps": sum(len(parameter) == 128 for parameter in e.parameters),
            }
            if e.registers
            else {"name": e.name}
            for e in log
        ]

    answer: dict[str, Any] = {}
    for name in names:
        trains = name in forms.TRAINED
        make, m = (forms.TRAINED if trains else forms.DECODED)[name]
        module, x = make().train(trains), forms.tensor(m, 4096, grad=trains)
        with torch.set_grad_enabled(trains), card.recorded() as there:
            ys = forms.forward(module, x)
        dys = [torch.empty_like(y) for y in ys]
        with card.recorded() as back:
            if trains:
                torch.autograd.backward(ys, dys)
        answer[name] = {"forward": shown(there), "backward": shown(back)}
    return answer


@pytest.fixture
def calls(on_card, form):
    """What the form launched, forward and backward."""
    share = next(share for share in SHARES if form in share)
    found = on_card(launched, share)[form]
    return found["forward"], found["backward"]


@pytest.mark.parametrize("form", COUNTS)
def test_launches(calls, form):
    assert tuple(map(len, calls)) == COUNTS[form], [[launch["name"] for launch in half] for half in calls]
    assert not [launch for half in calls for launch in half if launch["name"].startswith("aten")]


@pytest.mark.parametrize("form", COUNTS)
def test_no_register_is_spilled(calls):
    assert not {launch["name"]: launch["local"] for half in calls for launch in half if launch["local"]}


@pytest.mark.parametrize("form", COUNTS)
def test_what_streams_is_read_sixteen_bytes_at_a_time(form, calls):
    """The JIT compiles for what it is told of numbers and strides, not for what they are."""
    for launch in (launch for half in calls for launch in half if launch["name"] in STREAMING):
        narrow = sum(count for width, count in launch["loads"].items() if re.search(r"[US](8|16)$", width))
        # Of vectors a thread reads an element; the product variant's A_up (K, P) is read across its rows.
        assert narrow <= (16 if form == "product variant" else 4), launch


@pytest.mark.parametrize("form", COUNTS)
def test_the_large_products_take_tensor_maps(calls):
    """Of x, W and y, or dy, W and dx. One against the rules of the driver would have been refused."""
    for launch in (launch for half in calls for launch in half):
        if launch["name"] in ("glora_fwd", "glora_dx"):
            assert launch["maps"] == 3, launch["name"]
        if launch["name"] in ("grouped_fwd", "grouped_dx"):
            assert launch["maps"] > 3, launch["name"]
