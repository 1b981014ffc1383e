"""After `warmup`, no number of tokens compiles anything: neither of kept programs, nor of calls as they are written."""

from __future__ import annotations

import pytest

from dry_card.test_compilations import ROWS

FORMS = ["LoRA, dropout", "A=vector B=lora C=D=E=vector", "NF4", "q/k/v fused"]


def asked(names: list[str], compiles: bool) -> dict[str, tuple[int, list[int], list[str]]]:
    """Of each layer, how many kernels its warmup asked for, the rows at which more were, and what warmup said."""
    import torch
    from torch import nn

    import glora_kernels as gk
    from dry_card import card, forms

    answer = {}
    for name in names:
        module, late = forms.TRAINED[name][0](), []
        with card.compilations(compiles) as found:
            lines = gk.warmup(nn.Sequential(module), 8192, progress=False)
            warmed = len(found)
            for m in ROWS:
                before = len(found)
                forms.step(module, forms.tensor(m, 4096, grad=True))
                with torch.no_grad():
                    forms.forward(module, forms.tensor(m, 4096))
                late += [m] * (len(found) - before)
        answer[name] = warmed, late, lines
    return answer


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_compiled_after_it(name, on_card):
    warmed, late, lines = on_card(asked, FORMS, False, GLORA_KERNELS_LAUNCH="slow")[name]
    assert warmed >= 6
    assert not late
    assert "with 1, 16, 32, 64, 512, 2048, 4096 tokens, " in lines[0]


def test_nor_by_kept_programs(on_card):
    warmed, late, _ = on_card(asked, FORMS[:1], True)[FORMS[0]]
    assert warmed >= 6
    assert not late


OPTIONS = [[], ["--four-bit", "nf4"], ["--case", "glora:vector,lora,vector,none,vector"]]


def commanded(options: list[str]) -> tuple[int, int, list[str], list[str]]:
    """The status of the command, how many kernels it asked for, which ones a step asks for after it, and its lines."""
    import contextlib
    import io
    import json
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import glora_kernels as gk
    from dry_card import card
    from glora_kernels.__main__ import main

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=64, architectures=["LlamaForCausalLM"])
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, card.compilations(False) as found:
        config.save_pretrained(folder)
        with contextlib.redirect_stdout(printed):
            status = main(["warmup", "--config", folder, "--rank", "8", "--tokens", "2048", "--json", *options])
        warmed = len(found)
        own = dict(zip(options[::2], options[1::2], strict=True))
        forms = own.get("--case", "glora:none,lora,none,none,none").removeprefix("glora:").split(",")
        alpha = 8 if "--case" in own else 16
        model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
        if "--four-bit" in own:
            gk.quantize(model, own["--four-bit"])
        gk.inject(model, gk.GLoRAConfig(*forms, rank=8, alpha=alpha))
        for layer in model.modules():
            if isinstance(layer, gk.GLoRALinear):
                for tokens in (2048, 100):
                    x = torch.zeros(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                    layer(x).backward(torch.zeros(tokens, layer.out_features, device="cuda", dtype=torch.bfloat16))
    return status, warmed, found[warmed:], json.loads(printed.getvalue())["kinds"]


@pytest.mark.parametrize("options", OPTIONS, ids=["LoRA", "NF4", "GLoRA"])
def test_the_command_compiles_what_a_model_of_the_config_asks_for(options, on_card):
    pytest.importorskip("transformers")
    status, warmed, late, kinds = on_card(commanded, options, GLORA_KERNELS_LAUNCH="slow")
    assert status == 0
    assert warmed >= 6
    assert late == []
    assert len(kinds) == 3  # 256 to 256, 256 to 512, 512 to 256
