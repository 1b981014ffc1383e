"""What the card is given by a call of many adapters, and what it compiles as they change."""

from __future__ import annotations

from typing import Any

import pytest

FORMS = ("LoRA", "everything")


def _adapters(count: int, rank: int, everything: bool, grad: bool = True) -> list[dict[str, Any]]:
    import torch

    from dry_card import forms

    found: list[dict[str, Any]] = []
    for j in range(count):
        mine = {"b_up": forms.tensor(4096, rank, grad=grad), "b_down": forms.tensor(rank, 4096, grad=grad)}
        if everything:
            mine |= {name: forms.tensor(4096, grad=grad) for name in ("a", "c", "d", "e")}
        found.append({**mine, "scale": 1.0 + j, "dropout_p": 0.1, "seed": torch.tensor([j])})
    return found


def _step(m: int, adapters: list[dict[str, Any]], rows: Any, bias: bool = False) -> None:
    import torch

    from dry_card import forms
    from glora_kernels.ops import multi_glora_linear

    x = forms.tensor(m, 4096, grad=adapters[0]["b_up"].requires_grad)
    y = multi_glora_linear(x, forms.tensor(4096, 4096), forms.tensor(4096) if bias else None, adapters, rows)
    if y.requires_grad:
        y.backward(torch.empty_like(y))


def launched() -> dict[str, Any]:
    """By form what a training step launches where the rows were sorted before, and whether the host waits."""
    import torch

    from dry_card import card

    answer: dict[str, Any] = {}
    for form in FORMS:
        adapters, rows = _adapters(8, 16, form == "everything"), torch.zeros(512, dtype=torch.int64, device="cuda")
        _step(512, adapters, rows, bias=True)
        waits = card.waits()
        with card.recorded() as log:
            _step(512, adapters, rows, bias=True)
        answer[form] = [e.name for e in log], [e.local_bytes for e in log], card.waits() - waits
    return answer


@pytest.mark.parametrize("form", FORMS)
def test_launches(on_card, form):
    names, local, waits = on_card(launched)[form]
    ours = [name for name in names if name.startswith("_multi")]
    assert len(ours) == 5
    assert not any(local)
    assert waits == 0


def asked() -> list[Any]:
    """The kernels that calls ask to be compiled, one list a call: other numbers of adapters, ranks and assignments."""
    import torch

    from dry_card import card

    found, so_far = [], 0
    with card.compilations(False) as names:
        for m, count, rank in ((32, 32, 16), (32, 4, 16), (64, 64, 8), (33, 128, 16), (48, 1, 8)):
            rows = torch.arange(m, device="cuda") % count
            _step(m, _adapters(count, rank, False, grad=False), rows)
            found.append(names[so_far:])
            so_far = len(names)
    return found


def test_adapters_ranks_and_rows_are_data(on_card):
    first, *others = on_card(asked, GLORA_KERNELS_LAUNCH="slow")
    assert sorted(first) == ["_multi_expand_kernel", "_multi_plan_kernel", "_multi_shrink_kernel"]
    assert not any(others)


def captured() -> list[str]:
    """A step inside of a CUDA graph, with the adapters of a call before, and with others."""
    import torch

    from dry_card import card

    adapters, rows = _adapters(4, 16, False, grad=False), torch.zeros(8, dtype=torch.int64, device="cuda")
    _step(8, adapters, rows)
    with card.recorded() as log, torch.cuda.graph(torch.cuda.CUDAGraph()):
        _step(8, adapters, rows)
    said = ""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            _step(8, _adapters(4, 16, False, grad=False), rows)
    except RuntimeError as error:
        said = str(error)
    for adapter in adapters:
        adapter["a_up"], adapter["a_down"] = adapter["b_up"], adapter["b_down"]
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            _step(8, adapters, rows)
    except RuntimeError as error:
        said += str(error)
    return [*(e.name for e in log), said]


def test_a_graph_sorts_its_rows_anew_and_keeps_its_adapters(on_card):
    *names, said = on_card(captured)
    assert [name for name in names if name.startswith("_multi")] == [
        "_multi_plan_kernel", "_multi_shrink_kernel", "_multi_expand_kernel",
    ]  # fmt: skip
    assert "call it once with these tensors first" in said
    assert "adapters with A=lora are sorted on the host, which no CUDA graph can hold" in said


def asserted() -> str:
    """What the kernel that sorts rows asserts on the card."""
    import torch

    from glora_kernels.multi.plan import multi_plan_launch

    rows, places, starts = (torch.zeros(size, dtype=dtype, device="cuda") for size, dtype in (
        (8, torch.int64), (8, torch.int32), (4, torch.int32),
    ))  # fmt: skip
    return str(multi_plan_launch(rows, places, starts).compiled().asm["ptx"])


def test_a_number_of_no_adapter_is_asserted_on_the_card(on_card):
    ptx = on_card(asserted)
    assert "__assertfail" in ptx
    message = "rows must be numbers of adapters"
    assert message in ptx or ", ".join(str(ord(c)) for c in message) in ptx


def decoded() -> dict[str, Any]:
    """What decoding with a set launches and waits for, again, and inside of CUDA graphs: of this set, and of another
    one."""
    import torch

    from dry_card import card, forms
    from glora_kernels.ops import AdapterSet, multi_glora_linear

    rows = torch.arange(4, device="cuda")
    plain = [{"b_up": forms.tensor(4096, 16), "b_down": forms.tensor(16, 4096)} for _ in range(4)]
    chosen, weight = AdapterSet(plain), forms.tensor(4096, 4096)

    def step(adapters: Any = chosen) -> None:
        with torch.no_grad():
            multi_glora_linear(forms.tensor(4, 4096), weight, None, adapters, rows)

    step()
    waits, answer = card.waits(), {}
    with card.recorded() as log:
        step()
    answer["again"], answer["waits"] = [e.name for e in log], card.waits() - waits
    with card.recorded() as log, torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
    answer["captured"] = [e.name for e in log]
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(AdapterSet([{**own, "b_up": forms.tensor(4096, 16)} for own in plain]))
    except RuntimeError as error:
        answer["another"] = str(error)
    return answer


def test_a_set_launches_what_its_list_does(on_card):
    found = on_card(decoded)
    kernels = ["_multi_shrink_kernel", "_multi_expand_kernel"]
    assert [name for name in found["again"] if name.startswith("_multi")] == kernels
    assert found["waits"] == 0
    assert [name for name in found["captured"] if name.startswith("_multi")] == ["_multi_plan_kernel", *kernels]
    assert "call it once with these tensors first" in found["another"]
