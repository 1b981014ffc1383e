"""What the card is given by a layer with several named adapters inside `gk.rows`."""

from __future__ import annotations

from typing import Any


def served() -> dict[str, Any]:
    """What a decode step with an adapter a row launches, in a graph too, and what is compiled as adapters change."""
    import torch
    from torch import nn

    import glora_kernels as gk
    from dry_card import card

    def layer_of(*configs: gk.GLoRAConfig) -> Any:
        linear = nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
        layer = gk.inject(linear, gk.GLoRAConfig.lora(rank=8), adapter_dtype=torch.bfloat16)
        for place, config in enumerate(configs):
            gk.add_adapter(layer, f"user{place}", config, adapter_dtype=torch.bfloat16)
        return layer.eval()

    answer: dict[str, Any] = {}
    layer = layer_of(*(gk.GLoRAConfig.lora(rank=rank, alpha=16) for rank in (8, 16, 8)))
    x, index = torch.empty(32, 1, 1024, device="cuda", dtype=torch.bfloat16), torch.zeros(32, dtype=torch.int64).cuda()
    with torch.no_grad(), gk.rows(layer, index):
        layer(x)
        with card.recorded() as log:
            layer(x)
        answer["again"] = [e.name for e in log]
        index.fill_(2)
        with card.recorded() as log:
            layer(x)
        answer["other rows"] = [e.name for e in log]
        with card.recorded() as log, torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
        answer["captured"] = [e.name for e in log]
    with card.compilations(False) as names, torch.no_grad():
        gk.add_adapter(layer, "late", gk.GLoRAConfig.lora(rank=16), adapter_dtype=torch.bfloat16)
        with gk.rows(layer, ["late", None, "default", "user1"] * 8):
            layer(x)
    answer["compiled later"] = list(names)
    return answer


def test_decoding(on_card):
    answer = on_card(served)
    kernels = ["_multi_shrink_kernel", "_multi_expand_kernel", "aten::mm"]
    assert answer["again"] == kernels
    assert answer["other rows"] == ["_multi_plan_kernel", *kernels]
    assert answer["captured"] == ["_multi_plan_kernel", *kernels]
    assert answer["compiled later"] == []
