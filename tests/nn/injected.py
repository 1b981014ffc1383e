"""What the tests of injection share: two configurations, paths of GLoRA layers, refusals that change nothing."""

import pytest

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.nn.model import named_layers

CFG = GLoRAConfig(rank=2)
OTHER = GLoRAConfig.lora(rank=3, alpha=6)
LINEARS = {
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.0", "mlp.2")
} | {"embed", "classifier.1"}
BODY = LINEARS - {"classifier.1"}
"""The linear layers of the classifier, and those that are no head."""


def fingerprint(model):
    """Everything injection could change."""
    modules = [(path, id(m), m.training) for path, m in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return modules, parameters, [vars(m).get("_glora_trained") for m in model.modules()]


def refused(model, *args, error=ValueError, match, **kwargs):
    """Injection fails with a message that matches, and nothing has changed."""
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        gk.inject(model, *args, **kwargs)
    assert fingerprint(model) == before


def paths(model):
    return set(named_layers(model))
