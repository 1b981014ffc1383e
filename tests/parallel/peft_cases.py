"""PEFT's LoRA over a model that transformers loads in parts, accelerated, equals one process."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor, distribute_tensor
from two_meshes import EXACT, alike, backward, filled, gradients, llama, loaded_in_parts, values

import glora_kernels as gk
from glora_kernels.integrations import bases

COLUMNS, ROWS = ["q_proj", "gate_proj"], ["o_proj", "down_proj"]


def accelerates(mesh, folder):
    """Every projection, with dropout, biases and a second adapter; PEFT's own row layers fail in forward."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.25, lora_bias=True)
    second = LoraConfig(r=2, target_modules=COLUMNS + ROWS, init_lora_weights=False)
    ours, alone = get_peft_model(loaded_in_parts(folder, mesh), config), filled(get_peft_model(llama(), config))
    gk.accelerate(alone)
    gk.accelerate(ours)
    assert not gk.acceleration(ours).kept, gk.acceleration(ours)
    _copy(ours, alone)
    for seed in (1, 2):
        for model in (ours.train(), alone.train()):
            torch.manual_seed(seed)
            backward(model, seed)
        alike(gradients(ours), gradients(alone))
    assert not any(isinstance(p.grad, DTensor) and p.grad.placements != p.placements for p in ours.parameters())
    for model in (ours, alone):
        torch.optim.SGD(gk.parameter_groups(model), lr=0.1).step()
        model.add_adapter("second", second)
        model.base_model.set_adapter(["default", "second"])
        model.eval()
    _copy(ours, alone)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, alone(tokens).logits, rtol=0, atol=EXACT)
        with ours.disable_adapter():
            torch.testing.assert_close(ours(tokens).logits, llama()(tokens).logits, rtol=0, atol=EXACT)
    report = gk.acceleration(ours)
    assert not report.kept, report
    assert {reason for _, reason in report.fallbacks} <= {bases.IDLE}, report
    alike(values(ours), values(alone))


def columns_equal_pefts(mesh, folder):
    """Beside PEFT's own path, which serves column layers: the same loss and gradients, after decelerate again."""
    config = LoraConfig(r=4, target_modules=COLUMNS, init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(loaded_in_parts(folder, mesh), config)
    wanted = backward(model, 0), gradients(model)
    for switch in (gk.accelerate, gk.decelerate):
        switch(model)
        model.zero_grad()
        torch.testing.assert_close(backward(model, 0), wanted[0], rtol=0, atol=EXACT)
        alike(gradients(model), wanted[1])
    gk.accelerate(model)
    hooked = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    hooked.register_forward_hook(lambda *_: None)
    model.zero_grad()
    torch.testing.assert_close(backward(model, 0), wanted[0], rtol=0, atol=EXACT)
    alike(gradients(model), wanted[1])
    assert [reason for _, reason in gk.acceleration(model).kept] == [bases.HOOKED]


@torch.no_grad()
def _copy(ours, alone):
    """The values of one process, in the parts of a rank."""
    own = dict(alone.named_parameters())
    for name, p in ours.named_parameters():
        given = own[name].detach()
        p.copy_(distribute_tensor(given, p.device_mesh, p.placements) if isinstance(p, DTensor) else given)
