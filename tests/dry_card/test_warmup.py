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
