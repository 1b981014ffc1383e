"""Fusing the siblings of whole models: the same numbers, fewer calls, the same names and files."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.nn import fuse, siblings
from glora_kernels.nn.fuse import fuse_cross_attention, fuse_siblings, split_siblings
from glora_kernels.nn.model import named_layers
from glora_kernels.reference.tolerance import allowed_error, largest_error

LORA = GLoRAConfig.lora(rank=3, alpha=6)
DROPS = GLoRAConfig("none", "lora", "vector", "none", "vector", rank=3, dropout=0.5)


@pytest.fixture
def t5():
    """A function that builds a small T5 with gated MLPs and two layers a stack."""

    def build():
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).double()

    return build


def pair(model, config, randomize, *args):
    """Two copies of a model with adapters away from zero."""
    model = randomize(gk.inject(model, config, *args)).double()
    return model, copy.deepcopy(model)


def step(model, *args, backward=lambda out: (out if torch.is_tensor(out) else out.logits).cos().sum(), **kwargs):
    """The output and every gradient of one step from a fixed seed."""
    model.zero_grad()
    torch.manual_seed(3)
    out = model(*args, **kwargs)
    backward(out).backward()
    out = out if torch.is_tensor(out) else out.logits
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def agree(got, expected):
    assert got.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert largest_error(got[name], value) <= allowed_error(value, value, torch.float64, scale), name


def nothing_waits(model):
    groups = {layer._siblings for layer in named_layers(model).values()} - {None}
    return bool(groups) and all(group._outputs.pending is None and group._seeds.pending is None for group in groups)


def test_llama_computes_the_same_in_two_calls_a_layer(llama, randomize, calls, tmp_path):
    plain, model = pair(llama(), DROPS, randomize)
    keys = list(model.state_dict())
    report = fuse_siblings(model.train())
    assert [name.rpartition(".")[2] for paths in report.groups for name in paths] == [
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    ]  # fmt: skip
    assert str(report).splitlines() == [
        "4 groups of siblings, each one launch forward (two with dropout, a large rank or fp32 factors)",
        "  2 x  model.layers.#.self_attn: q_proj, k_proj, v_proj",
        "  2 x  model.layers.#.mlp: gate_proj, up_proj",
    ]
    ids = torch.randint(0, 32, (2, 8))
    agree(step(model, ids), step(plain.train(), ids))
    assert calls == [3, 2, 3, 2]
    assert nothing_waits(model)
    assert list(model.state_dict()) == keys
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    gk.save_adapter(model, tmp_path / "a.safetensors")
    gk.load_adapter(model, tmp_path / "a.safetensors")
    loaded = gk.load_adapter(llama().double(), tmp_path / "a.safetensors")
    agree({"out": loaded(ids).logits}, {"out": model.eval()(ids).logits.detach()})


def test_llama_generates_the_same(llama, randomize, calls):
    plain, model = pair(llama(), LORA, randomize)
    fuse_siblings(model)
    ids = torch.randint(0, 32, (2, 4))
    for cache in (True, False):
        expected = plain.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache), expected)
    assert calls == [3, 2, 3, 2] * 8


def test_fusing_twice_changes_nothing_and_splitting_undoes_it(vit, randomize, calls):
    plain, model = pair(vit(), DROPS, randomize)
    x = torch.randn(2, 4, 12).double()
    expected = step(plain, x)
    report = fuse_siblings(model)
    groups = [layer._siblings for layer in named_layers(model).values()]
    assert fuse_siblings(model) == report
    assert [layer._siblings for layer in named_layers(model).values()] == groups
    agree(step(model, x), expected)
    split_siblings(model)
    assert all(layer._siblings is None for layer in named_layers(model).values())
    agree(step(model, x), expected)
    assert calls == [3, 3]
    with pytest.raises(ValueError, match="split_siblings: no layer"):
        split_siblings(model)


def test_merge_and_disabled_reach_fused_layers(vit, randomize, calls):
    plain, model = pair(vit(), LORA, randomize)
    fuse_siblings(model.eval())
    x = torch.randn(2, 4, 12).double()
    for some in (plain, model):
        some.eval()
    with torch.no_grad():
        for some in (plain, model):
            with gk.disabled(some):
                some.base = some(x)
            gk.merge(some)
            some.merged = some(x)
        assert torch.equal(model.base, plain.base)
        assert torch.equal(model.merged, plain.merged)
        assert not calls
        gk.unmerge(model)
        torch.testing.assert_close(model(x), model.merged)
    assert calls == [3, 3]


def checkpointed(mode):
    """A forward of the small ViT whose blocks are recomputed in backward."""

    def forward(model, x):
        x = model.embed(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=mode)
        return x

    return forward


class Called(nn.Module):
    def __init__(self, model, forward):
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, x):
        return self.run(self.model, x)


@pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_with_dropout_gives_the_same_gradients(mode, vit, randomize, calls):
    _, model = pair(vit(), DROPS, randomize, ["embed", "*_proj", "*.mlp.*"])
    expected = step(Called(model, lambda m, x: m.blocks[1](m.blocks[0](m.embed(x)))), torch.ones(3, 4, 12).double())
    fuse_siblings(model)
    for _ in range(2):
        agree(step(Called(model, checkpointed(mode)), torch.ones(3, 4, 12).double()), expected)
        assert nothing_waits(model)
    assert calls == [3] * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_with_checkpoints_needs_the_switch_that_the_documentation_names(vit, randomize):
    torch._dynamo.reset()
    _, model = pair(vit(depth=1), LORA, randomize, ["embed", "*_proj"])
    expected = step(Called(model, checkpointed(False)), torch.ones(2, 4, 12).double())
    fuse_siblings(model)
    function = torch.compile(Called(model, checkpointed(False)), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        got = step(function, torch.ones(2, 4, 12).double())
    agree({name.removeprefix("_orig_mod."): value for name, value in got.items()}, expected)
    assert nothing_waits(model)


def test_gradient_accumulation_and_optimizer_steps_are_the_same(vit, randomize):
    models = pair(vit(), DROPS, randomize)
    fuse_siblings(models[1])
    x = torch.randn(4, 2, 4, 12).double()
    for model in models:
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            for micro in x:
                model(micro).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# What is left out, and groups of other names.


def test_what_is_left_out_is_reported_with_the_reason(llama):
    rich = GLoRAConfig("vector", "lora", "none", "none", "none", rank=2)
    config = {"*.0.*.k_proj": None, "*.1.*.[qkv]_proj": rich, "*.0.mlp.gate_proj": None, "*_proj": LORA}
    model = gk.inject(llama(), config)
    report = fuse_siblings(model)
    assert report.groups == (
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
    )
    reasons = {paths[-1]: reason for paths, reason in report.left_out}
    assert reasons == {
        "model.layers.0.mlp.up_proj": "only 'model.layers.0.mlp.up_proj' is adapted",
        "model.layers.1.self_attn.v_proj": "'model.layers.1.self_attn.q_proj' has A='vector'; A must be 'none'",
    }
    assert "left out: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj: only" in str(report)


def test_groups_by_name_for_other_models(vit, randomize, calls):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(5, 12)

        def forward(self, x):
            return self.out(self.a(x) * self.b(x))

    plain, model = pair(nn.Sequential(Renamed(), Renamed()), LORA, randomize)
    with pytest.raises(ValueError, match=r"no GLoRA layers to fuse. Available GLoRA layer names: 'a', 'b', 'out'"):
        fuse_siblings(model)
    with pytest.raises(ValueError, match=r"groups\[0\]: the pattern 'c' matches no GLoRA layer"):
        fuse_siblings(model, groups=[["a", "c"]])
    with pytest.raises(TypeError, match=r"groups\[0\] takes patterns"):
        fuse_siblings(model, groups=["ab"])
    with pytest.raises(ValueError, match="in_features differs"):
        fuse_siblings(model, groups=[["a", "out"]])
    assert fuse_siblings(model, groups=[["a", "b"]]).groups == (("0.a", "0.b"), ("1.a", "1.b"))
    x = torch.randn(3, 12).double()
    agree(step(model, x), step(plain, x))
    assert calls == [2, 2]
    with pytest.raises(ValueError, match="call inject"):
        fuse_siblings(vit())


def test_groups_that_overlap_are_refused_before_anything_changes(vit):
    model = gk.inject(vit(), LORA)
    with pytest.raises(ValueError, match=r"'blocks.0.attn.k_proj' is in groups\[0\] and groups\[1\]"):
        fuse_siblings(model, groups=[["q_proj", "k_proj"], ["k_proj", "v_proj"]])
    assert all(layer._siblings is None for layer in named_layers(model).values())


def test_the_report_has_one_line_for_blocks_that_are_alike(llama):
    model = gk.inject(llama(), LORA, ["q_proj", "gate_proj", "up_proj"])
    report = fuse_siblings(model)
    q, k, v = (f"model.layers.#.self_attn.{name}_proj" for name in "qkv")
    assert str(report).splitlines() == [
        "2 groups of siblings, each one launch forward (two with dropout, a large rank or fp32 factors)",
        "  2 x  model.layers.#.mlp: gate_proj, up_proj",
        f"  left out: {q}, {k}, {v}: only {q!r} is adapted (2 such sets)",
    ]
    assert repr(report) == str(report)


def test_siblings_that_read_different_inputs_are_an_error_by_name(vit, randomize):
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.up_proj(self.gate_proj(x))

    _, model = pair(nn.Sequential(Swapped()), LORA, randomize)
    fuse_siblings(model)
    with pytest.raises(RuntimeError, match=r"'0.up_proj' was called with another tensor than '0.gate_proj'.*split_sib"):
        model(torch.randn(3, 12).double())
    assert nothing_waits(model)


# Cross-attention over depth.

IDS, LABELS = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])


def run(model):
    return step(model, IDS, labels=LABELS)


def test_k_and_v_of_every_decoder_layer_are_one_call(t5, randomize, calls):
    plain, model = pair(t5(), LORA, randomize)
    expected = run(plain)
    fuse_siblings(model)
    agree(run(model), expected)
    assert calls == [3, 2] * 2 + [3, 2, 2] * 2
    calls.clear()
    report = fuse_cross_attention(model)
    stack = [paths for paths in report.groups if "EncDecAttention" in paths[0]]
    assert stack == [tuple(f"decoder.block.{i}.layer.1.EncDecAttention.{n}" for i in range(2) for n in "kv")]
    assert "1 x  decoder.block.#.layer.#.EncDecAttention: k, v of 2 layers" in str(report)
    assert fuse_cross_attention(model) == fuse_siblings(model) == report
    for _ in range(2):
        agree(run(model), expected)
        assert nothing_waits(model)
    assert calls == [3, 2, 3, 2, 3, 4, 2, 3, 2] * 2
    copied = copy.deepcopy(model)
    agree(run(copied), expected)


def test_generation_with_and_without_a_cache_computes_the_same(t5, randomize, calls):
    plain, model = pair(t5().eval(), LORA, randomize)
    fuse_cross_attention(model)
    for cache, count in ((True, 1), (False, 3)):
        expected = plain.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=cache)
        assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=cache), expected)
        assert calls == [4] * count
        calls.clear()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_cross_attention_under_checkpoints_has_the_same_gradients_and_masks(t5, randomize, calls, reentrant, training):
    plain, model = pair(t5(), DROPS, randomize, ["*.EncDecAttention.*"])
    fuse_cross_attention(model)

    def decode(model, x, encoded):
        for block in model.decoder.block:
            x = x + checkpoint(attend, block.layer[1].EncDecAttention, x, encoded, use_reentrant=reentrant)
        return x

    def attend(layer, x, encoded):
        return layer(x, key_value_states=encoded)[0]

    results = []
    x, encoded = torch.randn(2, 4, 16).double(), torch.randn(2, 3, 16).double()
    for some in (plain, model):
        some.train(training)
        torch.manual_seed(2)
        inputs = [x.clone().requires_grad_(), encoded.clone().requires_grad_()]
        y = decode(some, *inputs)
        y.square().sum().backward()
        parameters = [p for p in some.parameters() if p.requires_grad]
        results.append(dict(enumerate([y.detach(), *(p.grad for p in [*inputs, *parameters])])))
    agree(results[1], results[0])
    forward = [4] if reentrant and not training else [2, 2]
    assert calls == [*forward, 2, 2]
    assert nothing_waits(model)


@pytest.mark.parametrize("cached", [False, True], ids=["encoded anew", "cached encoder states"])
def test_decoder_layers_that_are_skipped_leave_nothing_wrong(cached, t5, randomize):
    plain, model = pair(t5(), LORA, randomize, ["*.EncDecAttention.*"])
    fuse_cross_attention(model)
    generator = torch.Generator().manual_seed(7)
    alive = [torch.randn(2, 3, 16, generator=generator).double() for _ in range(4)]
    x = torch.randn(2, 4, 16, generator=generator).double()
    for i, kept in enumerate([(0,), (1,), (0, 1), (1,)]):
        results = []
        for some in (plain, model):
            y = x
            for j in kept:
                layer = some.decoder.block[j].layer[1].EncDecAttention
                y = y + layer(y, key_value_states=alive[0 if cached else i])[0]
            y.square().sum().backward()
            grads = {name: p.grad for name, p in some.named_parameters() if p.grad is not None}
            results.append({"y": y.detach()} | grads)
        # No gradient of a member that was computed but not called is None: it is zero.
        agree({name: results[1][name] for name in results[0]}, results[0])


def test_a_stack_larger_than_a_launch_becomes_several_groups(t5, randomize, calls, monkeypatch):
    monkeypatch.setattr(fuse, "MAX_MEMBERS", 3)
    plain, model = pair(t5(), LORA, randomize)
    report = fuse_cross_attention(model, "*.EncDecAttention.[kv]")
    assert [len(paths) for paths in report.groups] == [2, 2]
    agree(run(model), run(plain))
    assert calls == [2, 2]
    split_siblings(model)
    with pytest.raises(ValueError, match=r"layers: the pattern 'w' matches no GLoRA layer"):
        fuse_cross_attention(model, "w")
    no_cross = gk.inject(nn.ModuleDict({"q": nn.Linear(4, 4)}), LORA)
    with pytest.raises(ValueError, match="no GLoRA layers to fuse"):
        fuse_cross_attention(no_cross)


def test_tied_pairs_keep_their_mask_over_depth_and_apart(t5, randomize, monkeypatch):
    plain, model = pair(t5(), DROPS, randomize, ["*.EncDecAttention.[kv]"])
    for some in (plain, model):
        layers = named_layers(some)
        first = layers["decoder.block.0.layer.1.EncDecAttention.k"].B_down
        for i in range(2):
            k, v = (layers[f"decoder.block.{i}.layer.1.EncDecAttention.{name}"] for name in "kv")
            k.B_down = v.B_down = first
            siblings.install({f"{i}.k": k, f"{i}.v": v}, fused=False)
    drawn = []
    draw = siblings.dropout_seed
    monkeypatch.setattr(siblings, "dropout_seed", lambda device: drawn.append(draw(device)) or drawn[-1])
    expected = run(plain.train())
    assert len({int(seed) for seed in drawn}) == len(drawn) == 2, "one mask a block, whoever shares B_down"
    fuse_cross_attention(model.train())
    agree(run(model), expected)
    assert len(drawn) == 4
    split_siblings(model)
    agree(run(model), expected)
    assert len(drawn) == 6
