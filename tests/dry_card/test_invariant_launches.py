"""What the card is given inside `batch_invariant`: the same machine code for every M, and no vendor's product."""

from __future__ import annotations

from typing import Any

import pytest

FORMS = ("LoRA, dropout", "A=vector B=lora C=D=E=vector", "q/k/v fused", "NF4")
ROWS = (1, 7, 512, 8192)


def launched() -> dict[str, Any]:
    """By form, of each number of rows: name and hash of the machine code of each launch; and what compiled at last."""
    import hashlib

    import glora_kernels as gk
    from dry_card import card, forms

    answer: dict[str, Any] = {}
    for form in FORMS:
        module, each = forms.TRAINED[form][0](), []
        with gk.batch_invariant(), card.compilations() as compiled:
            for m in ROWS:
                x = forms.tensor(m, 4096, grad=True)
                before = len(compiled)
                with card.recorded() as log:
                    forms.step(module, x)
                each.append(
                    [(e.name, hashlib.sha256(e.machine_code()).hexdigest() if e.registers else "") for e in log]
                )
            answer[form] = each, compiled[before:]
    return answer


@pytest.mark.parametrize("form", FORMS)
def test_every_m_runs_the_same_code(on_card, form):
    (first, *others), compiled = on_card(launched)[form]
    assert not [name for name, _ in first if name.startswith("aten") and "mm" in name]
    assert {"_glora_fwd_kernel", "_glora_dx_kernel"} <= {name for name, code in first if code}
    for each in others:
        assert each == first
    assert compiled == []
