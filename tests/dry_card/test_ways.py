"""The quick way of launching against the slow one, GLORA_KERNELS_LAUNCH=slow: the card is given the same."""

from __future__ import annotations

from typing import Any

import pytest

FORMS = {
    "LoRA": (512, 512, 500, 512, 1, 1),
    "LoRA, dropout": (512, 512, 300),
    "A=vector B=lora C=D=E=vector": (512, 512),
    "A=B=lora": (512, 512),
    "q/k/v fused": (512, 512, 500),
}
"""The M of calls one after another: the first plans, the next takes what it planned, or sizes it anew."""


def given() -> dict[str, list[list[dict[str, Any]]]]:
    """Of each form's calls, what the card was given."""
    return {name: _calls(name, rows) for name, rows in FORMS.items()}


def _calls(name: str, rows: tuple[int, ...]) -> list[list[dict[str, Any]]]:
    import torch

    from dry_card import card, forms

    torch.manual_seed(0)  # of dropout: a number among the arguments
    module, calls = forms.TRAINED[name][0](), []
    with card.fresh_addresses():
        for m in rows:
            x = forms.tensor(m, 4096, grad=True)
            with card.recorded() as log:
                ys = forms.forward(module, x)
                dys = [torch.empty_like(y) for y in ys]
                torch.autograd.backward(ys, dys)
            tensors = {"x": x, **dict(module.named_parameters())}
            tensors |= {f"{n}.grad": t.grad for n, t in tensors.items() if t.grad is not None}
            tensors |= {f"{n}{i}": t for n, ts in (("y", ys), ("dy", dys)) for i, t in enumerate(ts)}
            calls.append(_named(log, tensors))
            module.zero_grad()
    return calls


def _named(log: list[Any], tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """Launches, with names for addresses: (tensor, offset), or the how manieth piece of scratch."""
    from dry_card import card

    scratch: dict[int, str] = {}

    def pointer(address: int) -> str:
        for name, tensor in tensors.items():
            if 0 <= address - tensor.data_ptr() < tensor.nbytes:
                return f"{name}+{address - tensor.data_ptr()}"
        if card.device.owner(address) == -1:
            return hex(address)
        return scratch.setdefault(address, f"scratch {len(scratch)}")

    def named(parameter: bytes) -> str:
        if len(parameter) not in (8, 128):
            return parameter.hex()
        return f"{pointer(int.from_bytes(parameter[:8], 'little'))} {parameter[8:].hex().rstrip('0')}".rstrip()

    return [
        {
            "name": e.name, "grid": e.grid, "threads": e.threads, "shared": e.shared, "cluster": e.cluster,
            "dependent": e.dependent, "cooperative": e.cooperative, "device": e.device, "stream": e.stream,
            "parameters": list(map(named, e.parameters)),
        } for e in log
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_both_ways_give_the_card_the_same(form, on_card):
    slow = on_card(given, GLORA_KERNELS_LAUNCH="slow")[form]
    quick = on_card(given, GLORA_KERNELS_LAUNCH="")[form]
    assert len(slow) == len(quick) == len(FORMS[form])
    for i, (a, b) in enumerate(zip(slow, quick, strict=True)):
        assert [launch["name"] for launch in a] == [launch["name"] for launch in b], f"call {i}"
        for one, other in zip(a, b, strict=True):
            assert one == other, f"call {i}, {one['name']}"


def test_calls_of_one_form_are_given_the_same(on_card):
    """Of equal calls nothing but memory that is nobody's differs, and that is named by its order."""
    calls = on_card(given, GLORA_KERNELS_LAUNCH="slow")["LoRA"]
    assert calls[0] == calls[1] == calls[3]
    assert calls[4] == calls[5]
    parameters = {parameter for launch in calls[0] for parameter in launch["parameters"]}
    for name in ("x", "weight", "B_up", "B_down", "y0", "dy0", "x.grad", "B_up.grad", "B_down.grad"):
        assert any(p.startswith(f"{name}+0") for p in parameters), name
