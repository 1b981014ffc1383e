"""What is planned for a card that is not here (`tools.planned`) is what real calls on one ask Triton's JIT for."""

from __future__ import annotations

import pytest

LAYERS = ["LoRA", "LoRA, dropout", "A=vector B=lora C=D=E=vector", "A=B=lora", "product variant", "q/k/v fused", "NF4",
          "decode", "decode, NF4", "PEFT, accelerated"]  # fmt: skip
ROWS = [1, 9, 33, 300, 5000]


def asked() -> dict[str, list[list[str]]]:
    """Of each layer the keys of the forms that all numbers of rows ask for: by real calls, and planned."""
    import torch
    from triton import knobs

    import glora_kernels as gk
    from dry_card import forms
    from glora_kernels.runtime import environment
    from glora_kernels.runtime.launch import Launch
    from glora_kernels.tools import elsewhere, planned

    arch, real = environment.arch(0), set()

    def hook(*, compile, **_):
        real.add(elsewhere.key_of(compile["specialization_data"]))
        return True

    answer = {}
    for name in LAYERS:
        trains, found = name in forms.TRAINED, elsewhere.Forms()
        module = (forms.TRAINED if trains else forms.DECODED)[name][0]().train(trains)
        config = getattr(module, "config", forms.LORA)
        linear = planned.Linear(config, 4096, 4096, config.D != "none")
        if "NF4" in name:
            linear = linear._replace(quant_type="nf4", nested=module.quant_state.nested is not None)
        real.clear()
        for m in ROWS:
            with torch.set_grad_enabled(trains), knobs.runtime.scope():
                knobs.runtime.jit_cache_hook = hook
                (forms.step if trains else forms.forward)(module, forms.tensor(m, 4096, grad=trains))
            how = planned.How(m, torch.bfloat16, arch, training=trains, route="auto")
            both = planned.linear(linear, how)
            if name == "q/k/v fused":
                both = planned.group([linear._replace(n=n) for n in (4096, 1024, 1024)], how)
            steps = [*both.forward, *both.backward]
            if name == "PEFT, accelerated":
                layer = gk.accelerate(forms.peft(forms.linear(device="meta")), verbose=False).base_model.model.linear
                steps = planned.of_module(layer, forms.tensor(m, 4096, device="meta", grad=True), arch).steps
            with elsewhere.on_card(arch):
                for step in steps:
                    if isinstance(step, Launch):
                        found.ask(step)
        answer[name] = [sorted(real), sorted(found.found)]
    return answer


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_planned_is_what_is_compiled(name, on_card):
    real, planned = on_card(asked, GLORA_KERNELS_LAUNCH="slow")[name]
    assert real
    assert real == planned
