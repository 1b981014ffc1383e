"""What the card is given by a layer whose ranks, maps and links change between two calls."""

from __future__ import annotations

from typing import Any


def changed() -> dict[str, Any]:
    """The sizes that every launch and library product of a step is given, as a layer changes."""
    import torch
    from torch import nn

    import glora_kernels as gk
    from dry_card import card

    def fresh(rank: int = 16) -> Any:
        linear = nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
        return gk.inject(linear, gk.GLoRAConfig.lora(rank=rank, alpha=rank), adapter_dtype=torch.bfloat16)

    x = torch.empty(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(layer: Any) -> list[str]:
        layer(x).sum().backward()  # what a class of calls is compiled and recorded by
        with card.recorded() as log:
            layer(x).sum().backward()
        return [e.name for e in log if "kernel" in e.name]

    layer = fresh()
    answer: dict[str, Any] = {"before": step(layer)}
    gk.edit_ranks(layer, {"*": [*range(16), *[None] * 16]})
    answer["edited"], answer["gradient"] = step(layer), list(layer.B_up.grad.shape)
    answer["as one injected so"] = step(fresh(32))
    layer = fresh()
    gk.set_mid(layer, "gain")
    answer["with gains"] = step(layer)
    layer = fresh()
    gk.set_mid(layer, "tasks", tasks=2, ups=2)
    with gk.tasks(layer, 1):
        answer["one task"] = step(layer)
    with gk.tasks(layer, torch.arange(2048).cuda() % 2):
        answer["two tasks"] = step(layer)
    return answer


def test_a_changed_layer_launches_what_one_made_so_does(on_card):
    answer = on_card(changed)
    assert answer["edited"] == answer["as one injected so"]
    assert answer["gradient"] == [1024, 32]
    assert answer["with gains"] == answer["before"]
    assert answer["one task"] == answer["edited"]
    assert any(name.startswith("_multi_") for name in answer["two tasks"])
