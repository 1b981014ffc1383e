"""Shared factors in training: their gradient is the sum over layers, and nothing makes two of one."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from steps import losses_of
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig
from glora_kernels.nn.model import named_layers

CONFIGS = {
    "A": ShareLoRAConfig(rank=2, alpha=3, share="A"),
    "B": ShareLoRAConfig(rank=2, alpha=3, share="B"),
    "AB": ShareLoRAConfig(rank=2, alpha=3, share="AB", A="vector", C="vector", D="vector", E="vector"),
    "qkv": ShareLoRAConfig(rank=2, alpha=3, projections=["[qkv]_proj"], A="lora", E="constant"),
    "tied": ShareLoRAConfig(rank=2, alpha=3, share="A", tie_siblings=True),
    "tied-in-blocks": ShareLoRAConfig(rank=2, alpha=3, share="B", tie_siblings=True, C="lora"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


class Checkpointed(nn.Module):
    """The classifier with activation checkpointing: None, or `use_reentrant`."""

    def __init__(self, model, mode=None):
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x):
        x = self.model.embed(x)
        for block in self.model.blocks:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        return self.model.classifier(x.mean(1))


@pytest.fixture
def build(vit, randomize):
    """A function that builds the classifier of three blocks with shared factors away from zero, in float64."""

    def build(config, dtype=torch.float64, **changes):
        config = ShareLoRAConfig.from_dict(config.to_dict() | changes)
        model = gk.inject(vit(depth=3).to(dtype), config, ["embed", "*_proj", "*.mlp.*"], train=["classifier"])
        return randomize(model, std=0.2)

    return build


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, 12, generator=generator).to(dtype), torch.arange(4)


def backward(model, seed=0, dtype=torch.float64):
    """The gradients of one batch; dropout draws from a fixed seed."""
    x, labels = batch(seed, dtype)
    torch.manual_seed(7)
    F.cross_entropy(model(x).to(dtype), labels).backward()


def rows(model):
    return {(row.factor, row.paths) for row in gk.shared(model).rows}


def alone(model):
    """A copy in which every layer has factors of its own, of the same values, and nothing has a gradient."""
    model = copy.deepcopy(model)
    for layer in named_layers(model).values():
        for name, parameter in layer.adapter().items():
            setattr(layer, name, nn.Parameter(parameter.detach().clone()))
    assert not gk.shared(model).rows
    return model


def check_sums(model, apart, batches=1):
    """Every gradient of a model is the sum of those of the layers that share it, taken from its copy `alone`."""
    assert rows(model)
    layers, others = named_layers(model), named_layers(apart)
    for row in gk.shared(model).rows:
        parts = [others[path].adapter()[row.factor].grad for path in row.paths]
        assert len({id(part) for part in parts}) == row.uses
        total = torch.stack(parts).double().sum(0)
        grad = layers[row.paths[0]].adapter()[row.factor].grad
        # A sum of n terms errs by at most n - 1 half epsilons of the sum of their sizes; here two sums are compared.
        terms = batches * row.uses
        bound = (terms - 1) * torch.finfo(grad.dtype).eps * torch.stack(parts).double().abs().sum(0)
        assert ((grad - total).abs() <= bound).all(), (row.factor, row.key)
        assert grad.any()


@configs
def test_the_gradient_is_the_sum_over_layers_by_the_letter(config, build):
    model = build(config)
    seen = {}
    for path, layer in named_layers(model).items():

        def keep(module, args, output, path=path):
            seen[path] = {"x": args[0].detach()}
            output.register_hook(lambda dy: seen[path].update(dy=dy))

        layer.register_forward_hook(keep)
    backward(model)
    layers = named_layers(model)
    assert rows(model)
    for row in gk.shared(model).rows:
        total = 0
        for path in row.paths:
            x, dy = seen[path]["x"].flatten(0, -2), seen[path]["dy"].flatten(0, -2)
            g = torch.einsum("mn,mk->nk", dy, x)
            if row.factor == "B_down":
                total = total + 1.5 * layers[path].B_up.T @ g
            else:
                total = total + 1.5 * g @ layers[path].B_down.T
        grad = layers[row.paths[0]].adapter()[row.factor].grad
        assert torch.linalg.norm(grad - total) <= 1e-12 * torch.linalg.norm(total), row.key


@configs
@pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_with_dropout_gives_the_same_sum(mode, config, build):
    model = build(config, dropout=0.5)
    results = []
    for module in (model, Checkpointed(model, mode)):
        model.zero_grad()
        backward(module)
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-12, atol=1e-14, msg=name)
    if not config.tie_siblings:  # alone, siblings have masks of their own
        apart = alone(model)
        backward(apart)
        check_sums(model, apart)
    model.zero_grad()
    backward(model.eval())
    assert not torch.allclose(model.blocks[0].attn.q_proj.B_up.grad, results[0]["blocks.0.attn.q_proj.B_up"])


@pytest.mark.parametrize("share", ["none", "A", "B", "AB"])
def test_tied_siblings_drop_the_same_elements(share, build, randomize):
    model = build(ShareLoRAConfig(rank=16, share=share, tie_siblings=True), dropout=0.5)
    x = torch.randn(6, 16, dtype=torch.float64)
    for module in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert rows(module) == rows(model)
        dropped = []
        for layer in (module.blocks[1].attn.q_proj, module.blocks[1].attn.k_proj, module.blocks[2].attn.q_proj):
            low_rank = layer(x) - F.linear(x, layer.weight, layer.bias)
            dropped.append((low_rank @ torch.linalg.inv(layer.B_up @ layer.B_down).T).abs() < 1e-6)
        assert torch.equal(dropped[0], dropped[1])
        assert not torch.equal(dropped[0], dropped[2])
        assert 0.3 < dropped[0].double().mean() < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_over_16_bits_are_summed_in_fp32(dtype, build):
    """Over a bf16 base as it is, and over an fp32 base under autocast."""
    model = build(CONFIGS["A"], dtype)
    apart = alone(model)
    for module in (model, apart):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            backward(module, dtype=dtype)
    downs = [named_layers(model)[row.paths[0]].B_down for row in gk.shared(model).rows]
    assert {down.grad.dtype for down in downs} == {torch.float32}
    check_sums(model, apart)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_gives_the_same_gradients(randomize):
    torch._dynamo.reset()
    stack = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).double()
    model = randomize(gk.inject(stack, ShareLoRAConfig(rank=2, share="AB", E="vector")))
    other = copy.deepcopy(model)
    x = torch.randn(5, 8, dtype=torch.float64)
    for module in (model, torch.compile(other, fullgraph=True, backend="aot_eager")):
        module(x).square().sum().backward()
    assert [row.uses for row in gk.shared(other).rows] == [3, 3]
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14, msg=name)


@configs
def test_accumulation_clipping_and_three_steps_are_those_of_one_parameter(config, build):
    model = build(config)
    apart = alone(model)
    for seed in range(2):
        backward(model, seed)
        backward(apart, seed)
    check_sums(model, apart, batches=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in trained}) == len(trained)
    assert sum(p.numel() for p in trained) == gk.trainable_parameters(model)
    expected = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1 * float(expected))
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    clipped = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
    torch.testing.assert_close(clipped, 0.1 * expected, rtol=1e-6, atol=0)

    before = rows(model)
    shared = named_layers(model)["blocks.0.attn.q_proj"].adapter()[gk.shared(model).rows[0].factor]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    start = shared.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert rows(model) == before
    assert len(optimizer.state) == len(trained)
    assert optimizer.state[shared]["step"] == 3
    assert not torch.equal(shared, start)


def test_copies_share_among_themselves_and_with_nobody_else(build):
    model = build(CONFIGS["AB"])
    state = {name: value + i for i, (name, value) in enumerate(model.state_dict().items())}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert gk.shared(other) == gk.shared(model)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        with pytest.raises(RuntimeError, match="one shared parameter"):
            other.load_state_dict(state)
        other.load_state_dict(model.state_dict())
    other = copy.deepcopy(model)
    del model  # the refusal belongs to the copy
    with pytest.raises(RuntimeError, match="one shared parameter"):
        other.load_state_dict(state)


def test_an_average_of_the_weights_has_one_shared_factor_too(build):
    model = build(CONFIGS["AB"])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    average.update_parameters(model)
    assert gk.shared(average.module) == gk.shared(model)
    for name, parameter in average.module.named_parameters():
        moved = 0.25 if dict(model.named_parameters())[name].requires_grad else 0.0
        torch.testing.assert_close(parameter, first[name] + moved, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversions_keep_one_parameter(dtype, build):
    model = build(CONFIGS["A"])
    backward(model)
    apart = alone(model).to(dtype)
    expected = rows(model)
    assert rows(model.to(dtype)) == expected
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    model.zero_grad()
    x = batch(dtype=dtype)[0]
    assert torch.equal(model.eval()(x), apart.eval()(x))


@configs
def test_merging_and_disabling(config, build):
    model = build(config).eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    x = batch()[0]
    y = model(x)
    before = rows(model)
    gk.merge(model)
    layer = model.blocks[1].attn.q_proj
    if config.A == "none":
        expected = base["blocks.1.attn.q_proj.weight"] + 1.5 * layer.B_up @ layer.B_down
        torch.testing.assert_close(layer.weight, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-13)
    assert rows(model) == before
    with gk.disabled(model):
        bare = model(x)
    gk.unmerge(model)
    with gk.disabled(model):
        assert torch.equal(model(x), bare)
        assert rows(model) == before
    assert not torch.allclose(bare, y)
    assert torch.equal(model(x), y)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_llama_trains_shared_factors(llama):
    model = gk.inject(llama(), ShareLoRAConfig(rank=2, dropout=0.1, tie_siblings=True), train=["lm_head"]).train()
    ids = torch.randint(0, 32, (2, 8))
    losses = losses_of(model, torch.optim.AdamW, 10, lambda: model(ids, labels=ids).loss)
    assert losses[-1] < 0.9 * losses[0]
    assert [row.uses for row in gk.shared(model).rows] == [6, 2, 4, 2]


def test_transformers_stores_a_shared_factor_once(llama, gpt2, randomize, tmp_path):
    for build, tied in ((llama, False), (lambda: llama(tied=True), True), (gpt2, True)):
        config = ShareLoRAConfig(rank=2, share="AB")
        model = randomize(gk.inject(build(), config))
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        before = gk.shared(model)
        model.tie_weights()
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.save_pretrained(tmp_path)
            stored = load_file(tmp_path / "model.safetensors")
            absent = {f"{path}.{row.factor}" for row in before.rows for path in row.paths[1:]}
            assert set(expected) - set(stored) == absent | ({"lm_head.weight"} if tied else set())
            assert set(stored) <= set(expected)
            loaded = gk.inject(build(), config)
            loaded.load_state_dict(stored, strict=False)
            assert gk.shared(other) == gk.shared(loaded) == before
            for state in (loaded.state_dict(), other.state_dict()):
                assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert model.transformer.h[0].attn.c_attn.bias.shape == (48,), "no embedding's bias, whatever tie_weights does"
    assert set(model._tied_weights_keys) == {"lm_head.weight"}


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def test_the_trainer_resumes_shared_factors(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(folder, steps, resume=False):
        model = gk.inject(llama(), ShareLoRAConfig(rank=2, dropout=0.1, tie_siblings=True))
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=1, max_steps=steps, save_steps=2, learning_rate=1e-2,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = train(tmp_path / "straight", 4)
    half = train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4, resume=True)
    assert rows(resumed) == rows(straight)
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), straight.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    shared = [named_layers(model)["model.layers.0.self_attn.q_proj"].B_down for model in (half, straight)]
    assert not torch.equal(*shared)
