"""What the tests of sharing over depth share: which factors are one, and states that tie nothing."""

import pytest
import torch

import glora_kernels as gk

NAMES = {"none": set(), "A": {"B_down"}, "B": {"B_up"}, "AB": {"B_down", "B_up"}}


def groups(model):
    """Type key → number of uses, for the rows of B_down."""
    return {row.key: row.uses for row in gk.shared(model).rows if row.factor == "B_down"}


def refused(model, *args, match, **kwargs):
    """Injection fails with a message that matches, and nothing has changed."""

    def fingerprint():
        modules = [(path, id(m), len(m._load_state_dict_pre_hooks)) for path, m in model.named_modules()]
        return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    before = fingerprint()
    with pytest.raises(ValueError, match=match):
        gk.inject(model, *args, **kwargs)
    assert fingerprint() == before


def transformer(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "ViT":
        return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    if name == "BERT":
        return transformers.BertModel(transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def untied(model):
    """The state of a model that shares nothing: under each name a value of its own."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator) if "B_" in name else torch.zeros_like(value)
        state[name] = value + noise.to(value.dtype)
    return state
