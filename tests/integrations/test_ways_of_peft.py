"""Our PEFT methods and accelerated layers under torch.func, forward-mode differentiation and selective checkpoints."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import GloraConfig, LoraConfig
from test_peft_usage import FORMS, one_layer, rows
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from twins import assert_same, step

import glora_kernels as gk


@pytest.mark.parametrize("forms", FORMS)
def test_per_sample_gradients_and_tangents(forms):
    layer, x = one_layer(**FORMS[forms]), rows()
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return functional_call(layer, parameters, (row,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        layer.zero_grad()
        layer(row).square().sum().backward()
        for name, value in found.items():
            torch.testing.assert_close(value[i], layer.get_parameter(name).grad, rtol=0, atol=1e-10)
    with torch.no_grad():
        shift = layer(torch.zeros_like(x))
        _, tangent = jvp(layer, (x,), (x,))
        torch.testing.assert_close(tangent, layer(x) - shift, rtol=0, atol=1e-10)


def test_nested_and_sparse_x():
    layer, x = one_layer(**FORMS["everything"]), rows()
    nested = torch.nested.nested_tensor([x[:2], x[2:]])
    torch.testing.assert_close(torch.cat(layer(nested).unbind()), layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x.to_sparse()), layer(x), rtol=0, atol=1e-12)


def saves_products(context, operation, *arguments, **more):
    saved = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        context = partial(create_selective_checkpoint_contexts, saves_products)
        return checkpoint(self.inner, x, use_reentrant=False, context_fn=context)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=3, target_modules=["up"]), GloraConfig(r=3, target_modules=["up"], config_A_B="vector")]
)
def test_selective_checkpoints(adapted, x, config):
    model = gk.accelerate(adapted(config), verbose=False)
    expected = {name if name in "yx" else f"inner.{name}": value for name, value in step(model, x).items()}
    assert_same(step(Checkpointed(copy.deepcopy(model)), x), expected)


@pytest.mark.parametrize("forms", FORMS)
def test_selective_checkpoints_of_our_methods(forms):
    layer, x = one_layer(**FORMS[forms]), rows()
    expected = {name if name in "yx" else f"inner.{name}": value for name, value in step(layer, x).items()}
    assert_same(step(Checkpointed(layer), x), expected)
