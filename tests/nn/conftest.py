"""What the tests of the modules share: a layer with every parameter away from zero, and small models."""

import pytest
import torch
from adapter_files import saved, trained  # noqa: F401
from broods import brood, calls, seeds  # noqa: F401
from lycoris_runs import lycoris  # noqa: F401
from small_vit import ViT

from glora_kernels import GLoRAConfig
from glora_kernels.nn.model import named_layers


def _randomize(module, std=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in named_layers(module).values():
            for parameter in layer.adapter().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


@pytest.fixture
def randomize():
    """Give every adapter parameter of a layer or model a value away from zero; returns it."""
    return _randomize


@pytest.fixture
def vit():
    """A function that builds the small classifier, the same one each time."""

    def build(**kwargs):
        torch.manual_seed(0)
        return ViT(**kwargs)

    return build


@pytest.fixture
def llama():
    """A function that builds a LLaMA of two small layers, without a download."""

    def build(tied=False):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        return transformers.LlamaForCausalLM(config).eval()

    return build


@pytest.fixture
def gpt2():
    """A function that builds a small GPT-2, whose linear layers are Conv1D."""

    def build():
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()

    return build


@pytest.fixture
def full():
    """Every support in its richest form."""
    return GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3, alpha=6)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
