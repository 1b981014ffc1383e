"""Training: the adapter learns, the base does not move, and checkpointing gives the same gradients."""

import copy

import pytest
import torch
from steps import losses_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear
from glora_kernels.nn.model import named_layers

CONFIGS = {
    "default": GLoRAConfig(rank=4),
    "lora": GLoRAConfig.lora(rank=4, alpha=8, dropout=0.1),
    "all-lora": GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=4),
    "vectors": GLoRAConfig("vector", "vector", "vector", "vector", "vector"),
    "constants": GLoRAConfig("constant", "constant", "none", "constant", "constant"),
    "matmul": GLoRAConfig("lora", "lora", "vector", "none", "vector", rank=4, variant="matmul"),
}


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_adam_reduces_the_loss_and_leaves_the_base_bit_for_bit(config, vit):
    model = gk.inject(vit(), config, train=["classifier"])
    x, labels = torch.randn(16, 4, 12), torch.arange(16) % 5
    before = frozen(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = losses_of(model, torch.optim.Adam, 12, lambda: F.cross_entropy(model(x), labels))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    still = [name for name, p in model.named_parameters() if name in start and torch.equal(p, start[name])]
    # The softmax does not see a bias of the keys: k's part of it has no gradient but rounding.
    assert not [name for name in still if "k_proj" not in name]
    assert all(p.grad is None for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("which", ["adapter", "bias"])
def test_only_what_requires_a_gradient_gets_one(which, full, randomize):
    layer = randomize(gk.inject(nn.Linear(6, 4), full))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_((name == "bias") == (which == "bias") and name != "weight")
    layer(torch.randn(3, 6)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


class Checkpointed(nn.Module):
    def __init__(self, model, mode):
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x):
        x = self.model.embed(x)
        for block in self.model.blocks:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        return x


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_with_dropout_gives_the_same_gradients(mode, config, vit, randomize):
    if config.B == "lora":
        config = GLoRAConfig.from_dict(config.to_dict() | {"dropout": 0.5})
    model = randomize(gk.inject(vit(), config, ["embed", "*_proj", "*.mlp.*"]), std=0.1)
    x = torch.randn(3, 4, 12)
    results = []
    for checkpointing in (None, mode):
        model.zero_grad()
        torch.manual_seed(3)
        y = Checkpointed(model, checkpointing)(x)
        y.square().sum().backward()
        results.append([y.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(results[0]) > 13
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)
    if config.B == "lora":
        torch.manual_seed(4)
        assert not torch.allclose(Checkpointed(model, mode)(x), results[0][0]), "dropout was on"


def test_llama_trains_through_the_public_api(llama):
    model = gk.inject(llama(), CONFIGS["default"], train=["lm_head"]).train()
    ids = torch.randint(0, 32, (2, 8))
    losses = losses_of(model, torch.optim.AdamW, 10, lambda: model(ids, labels=ids).loss)
    assert losses[-1] < 0.9 * losses[0]


def test_llama_gradient_checkpointing_switch(llama, randomize):
    model = randomize(gk.inject(llama(), GLoRAConfig(rank=2, dropout=0.5)), std=0.1).train()
    ids = torch.randint(0, 32, (2, 8))
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_training_goes_on_after_saving_and_loading_as_if_nothing_had_happened(vit, tmp_path):
    x, labels = torch.randn(16, 4, 12), torch.arange(16) % 5

    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    def adam(model):
        return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)

    straight = gk.inject(vit(), CONFIGS["default"], train=["classifier"])
    optimizer = adam(straight)
    for _ in range(3):
        step(straight, optimizer)
    gk.save_adapter(straight, tmp_path / "a.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    resumed = gk.load_adapter(vit(), tmp_path / "a.safetensors")
    other = adam(resumed)
    other.load_state_dict(state)
    for _ in range(3):
        step(straight, optimizer)
        step(resumed, other)
    for (name, ours), (_, theirs) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_bf16_autocast_training_step(vit):
    model = gk.inject(vit(), CONFIGS["all-lora"], train=["classifier"])
    x, labels = torch.randn(16, 4, 12), torch.arange(16) % 5

    def loss_of():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), labels)

    losses = losses_of(model, torch.optim.Adam, 12, loss_of)
    assert losses[-1] < 0.7 * losses[0]
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_trains_as_the_eager_one(vit):
    torch._dynamo.reset()
    eager = gk.inject(vit(), CONFIGS["all-lora"], train=["classifier"])
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, labels = torch.randn(8, 4, 12), torch.arange(8) % 5
    for model in (eager, compiled):
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    for (name, ours), (_, theirs) in zip(eager.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert named_layers(other).keys() == named_layers(eager).keys()


@pytest.mark.parametrize("kind", ["Linear", "quantized", "GLoRALinear"])
def test_a_layer_of_inference_mode_is_trained(kind):
    """Its weight and bias cannot be saved for a backward; the same memory as other parameters can."""
    config = GLoRAConfig("vector", "lora", "lora", "vector", "vector", rank=2)
    with torch.inference_mode():
        layer = GLoRALinear(8, 4, config) if kind == "GLoRALinear" else nn.Linear(8, 4)
        if kind == "quantized":
            layer = gk.quantize(layer)
    if kind != "GLoRALinear":
        layer = gk.inject(nn.Sequential(layer), config, target_modules="*")[0]
    layer(torch.randn(3, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter().values())


def test_a_layer_adapted_in_inference_mode_is_trained():
    with torch.inference_mode():
        layer = gk.inject(nn.Sequential(nn.Linear(8, 4)), GLoRAConfig(rank=2), target_modules="*")[0]
    layer(torch.randn(3, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter().values())
