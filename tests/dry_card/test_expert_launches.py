"""What the card is given by a step over experts, and what it compiles as the rows and experts change."""

from __future__ import annotations

from typing import Any

import pytest

FORMS = ("LoRA", "everything, dropout", "NF4", "base alone")
PRODUCT, SHRINK, OUTER, SUM = (
    "_expert_product_kernel", "_multi_shrink_kernel", "_multi_outer_kernel", "_expert_sum_kernel",
)  # fmt: skip


def _step(form: str, tokens: int = 96, experts: int = 8, rank: int = 16, grad: bool = True) -> None:
    import torch

    from dry_card import forms
    from glora_kernels.glora.op import dropout_seed
    from glora_kernels.ops import expert_glora_linear
    from glora_kernels.quant import QuantizedWeight, QuantState

    n, k, codes = 512, 256, form == "NF4"
    adapters: dict[str, Any] = {}
    if form != "base alone":
        adapters = {
            "b_up": forms.tensor(experts, n, rank, grad=grad),
            "b_down": forms.tensor(experts, rank, k, grad=grad),
        }
    if form.startswith("everything"):
        adapters |= {"a": forms.tensor(experts, n, grad=grad), "e": forms.tensor(experts, n, grad=grad)}
        adapters |= {"dropout_p": 0.1, "seed": dropout_seed(torch.device("cuda"))}
    weight: Any = forms.tensor(experts, n, k)
    if codes:
        size = experts * n * k
        packed = torch.empty(size // 2, 1, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(size // 64, dtype=torch.float32, device="cuda")
        weight = QuantizedWeight(packed, QuantState(absmax, "nf4", 64, (experts * n, k), torch.bfloat16))
        adapters["e"] = forms.tensor(experts, n)
    x = forms.tensor(tokens, k, grad=grad)
    index = torch.zeros(tokens, 2, dtype=torch.int64, device="cuda")
    y = expert_glora_linear(x, weight, None, adapters, index=index)
    if y.requires_grad:
        y.backward(torch.empty_like(y))


def launched() -> dict[str, Any]:
    """By form the kernels of a second step, the bytes of local memory of each, and whether the host waits."""
    from dry_card import card

    answer: dict[str, Any] = {}
    for form in FORMS:
        _step(form)
        waits = card.waits()
        with card.recorded() as log:
            _step(form)
        answer[form] = [e.name for e in log], [e.local_bytes for e in log], card.waits() - waits
    return answer


@pytest.mark.parametrize(("form", "expected"), [
    ("LoRA", [SHRINK, PRODUCT, SHRINK, PRODUCT, SUM, OUTER]),
    ("everything, dropout", [SHRINK, PRODUCT, SHRINK, PRODUCT, SUM, PRODUCT, OUTER]),
    ("NF4", [SHRINK, PRODUCT, SHRINK, PRODUCT, SUM, OUTER]),
    ("base alone", [PRODUCT, PRODUCT, SUM]),
])  # fmt: skip
def test_launches(on_card, form, expected):
    names, local, waits = on_card(launched)[form]
    assert [name for name in names if name.startswith(("_multi", "_expert"))] == expected
    assert not any(local)
    assert waits == 0


def asked() -> list[Any]:
    """The kernels that calls ask to be compiled, one list a call: other numbers of tokens and experts, same sizes."""
    from dry_card import card

    found, so_far = [], 0
    with card.compilations(False) as names:
        for tokens, experts in ((40, 8), (56, 8), (40, 12), (41, 9)):
            _step("LoRA", tokens, experts, grad=False)
            found.append([name for name in names[so_far:] if name.startswith(("_multi", "_expert"))])
            so_far = len(names)
    return found


def test_tokens_and_experts_are_data(on_card):
    first, *others = on_card(asked, GLORA_KERNELS_LAUNCH="slow")
    assert sorted(first) == [PRODUCT, SHRINK]
    assert not any(others)


def captured() -> list[str]:
    """A step inside of a CUDA graph: its routing is data of the graph."""
    import torch

    from dry_card import card

    _step("LoRA", grad=False)
    with card.recorded() as log, torch.cuda.graph(torch.cuda.CUDAGraph()):
        _step("LoRA", grad=False)
    return [e.name for e in log if e.name.startswith(("_multi", "_expert"))]


def test_a_graph_holds_a_step(on_card):
    assert on_card(captured) == [SHRINK, PRODUCT]
