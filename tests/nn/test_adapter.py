"""Adapter files: what is written comes back."""

import copy
import json

import pytest
import torch
from adapter_files import CFG, OTHER, assert_same, contents, leftovers, refused
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear
from glora_kernels.nn.model import named_layers


def test_a_plain_model_becomes_the_saved_one(vit, trained, saved):
    model = vit()
    assert gk.load_adapter(model, saved) is model
    x = torch.randn(3, 4, 12)
    assert torch.equal(model.eval()(x), trained(x))
    assert {p: layer.config for p, layer in named_layers(model).items()} == {
        p: layer.config for p, layer in named_layers(trained).items()
    }
    for (name, ours), (other, theirs) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert (name, ours.requires_grad) == (other, theirs.requires_grad)


def test_what_was_loaded_saves_the_same_file(vit, saved, tmp_path):
    gk.save_adapter(gk.load_adapter(vit(), saved), tmp_path / "b.safetensors")
    assert_same(tmp_path / "b.safetensors", saved)


def test_an_injected_model_keeps_its_parameter_objects(vit, trained, saved):
    model = gk.inject(vit(), {"blocks.0.*": CFG, "*.mlp.*": None, "*": OTHER}, train=["classifier"])
    before = dict(model.named_parameters())
    gk.load_adapter(model, str(saved))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    x = torch.randn(3, 4, 12)
    assert torch.equal(model.eval()(x), trained(x))


def test_the_file_holds_the_adapter_and_the_trained_modules_only(trained, saved):
    tensors, metadata = contents(saved)
    assert set(tensors) == {name for name, p in trained.named_parameters() if p.requires_grad} | {
        f"classifier.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    config = json.loads(metadata["config"])
    assert config["train"] == ["classifier"]
    entry = config["layers"]["blocks.0.attn.o_proj"]
    assert entry == {
        "config": CFG.to_dict(), "in_features": 16, "out_features": 16, "bias": False, "train_bias": False
    }  # fmt: skip
    assert metadata["library_version"] == gk.__version__


def test_dropout_may_differ(vit, randomize, tmp_path):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(randomize(gk.inject(vit(), GLoRAConfig.lora(3, 6, dropout=0.25))), path)
    model = gk.load_adapter(gk.inject(vit(), GLoRAConfig.lora(3, 6)), path)
    assert model.embed.config.dropout == 0.0
    assert model.embed.B_up.ne(0).all()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(base, adapter, tmp_path, randomize):
    path = tmp_path / "a.safetensors"
    first = randomize(gk.inject(nn.Sequential(nn.Linear(8, 8)).to(base), CFG, adapter_dtype=adapter))
    gk.save_adapter(first, path)
    assert {t.dtype for t in contents(path)[0].values()} == {adapter}
    second = gk.load_adapter(nn.Sequential(nn.Linear(8, 8)).to(base), path)
    assert second[0].B_up.dtype == (base if base == adapter else torch.float32)
    assert torch.equal(first[0].B_up.float(), second[0].B_up.float()), "nothing is rounded"


def test_a_model_that_is_one_layer(tmp_path, randomize):
    path = tmp_path / "a.safetensors"
    linear = nn.Linear(4, 3)
    layer = randomize(gk.inject(copy.deepcopy(linear), CFG))
    gk.save_adapter(layer, path)
    assert set(contents(path)[0]) == set(layer.adapter())
    loaded = gk.load_adapter(linear, path)
    assert isinstance(loaded, GLoRALinear)
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), layer(x))


def test_an_adapter_without_parameters(tmp_path):
    nothing = GLoRAConfig("none", "none", "none", "none", "none")
    gk.save_adapter(nn.Sequential(GLoRALinear(4, 3, nothing)), tmp_path / "a.safetensors")
    assert gk.load_adapter(nn.Sequential(nn.Linear(4, 3)), tmp_path / "a.safetensors")[0].config == nothing


def test_gpt2_and_llama(gpt2, llama, tmp_path, randomize):
    for build in (gpt2, llama):
        model = randomize(gk.inject(build(), OTHER))
        gk.save_adapter(model, tmp_path / "a.safetensors")
        ids = torch.arange(5)[None]
        other = gk.load_adapter(build(), tmp_path / "a.safetensors").eval()
        assert torch.equal(other(ids).logits, model.eval()(ids).logits)


def test_merged_models_save_the_same_file_but_do_not_load(trained, saved, tmp_path):
    trained.embed.bias.requires_grad_(True)
    gk.save_adapter(trained, tmp_path / "b.safetensors")
    gk.merge(trained)
    gk.save_adapter(trained, tmp_path / "c.safetensors")
    assert_same(tmp_path / "c.safetensors", tmp_path / "b.safetensors")
    refused(trained, saved, "merged; call unmerge", RuntimeError)
    gk.unmerge(trained)
    gk.load_adapter(trained, saved)


def test_a_trained_base_bias_is_saved(tmp_path):
    model = gk.inject(nn.Sequential(nn.Linear(4, 3)), CFG)
    model[0].bias.requires_grad_(True)
    with torch.no_grad():
        model[0].bias.fill_(7.0)
    gk.save_adapter(model, tmp_path / "a.safetensors")
    for other in (nn.Sequential(nn.Linear(4, 3)), gk.inject(nn.Sequential(nn.Linear(4, 3)), CFG)):
        other = gk.load_adapter(other, tmp_path / "a.safetensors")
        assert torch.equal(other[0].bias, torch.full((3,), 7.0))
        assert other[0].bias.requires_grad


def test_parameters_that_are_trained_but_not_saved_are_named(trained, saved):
    trained.blocks[0].ln.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"blocks\.0\.ln\.weight.*train="):
        gk.save_adapter(trained, saved)


def test_shared_factors_are_stored_once_and_come_back_shared(vit, randomize, tmp_path):
    def build():
        model = gk.inject(vit(), OTHER, ["q_proj", "k_proj"])
        for name in ("q_proj", "k_proj"):
            getattr(model.blocks[1].attn, name).B_down = getattr(model.blocks[0].attn, name).B_down
        return model

    model = randomize(build())
    gk.save_adapter(model, tmp_path / "a.safetensors")
    assert "blocks.1.attn.q_proj.B_down" not in contents(tmp_path / "a.safetensors")[0]
    other = gk.load_adapter(vit(), tmp_path / "a.safetensors")
    for name in ("q_proj", "k_proj"):
        first, second = (getattr(other.blocks[i].attn, name) for i in range(2))
        assert first.B_down is second.B_down
        assert torch.equal(first.B_down, getattr(model.blocks[0].attn, name).B_down)
    assert gk.trainable_parameters(other) == gk.trainable_parameters(model)
    gk.load_adapter(build(), tmp_path / "a.safetensors")
    plain = gk.inject(vit(), OTHER, ["q_proj", "k_proj"])
    refused(plain, tmp_path / "a.safetensors", "the file shares.*B_down")
    gk.save_adapter(plain, tmp_path / "b.safetensors")
    refused(build(), tmp_path / "b.safetensors", "the model shares.*B_down")


def test_views_and_transposed_parameters(tmp_path):
    model = gk.inject(nn.Sequential(nn.Linear(4, 4)), OTHER)
    buffer = torch.randn(8, 3)
    with torch.no_grad():
        model[0].B_up.data = buffer[:4]
        model[0].B_down.data = buffer[4:].t()
    gk.save_adapter(model, tmp_path / "a.safetensors")
    tensors, _ = contents(tmp_path / "a.safetensors")
    assert torch.equal(tensors["0.B_up"], buffer[:4])
    assert torch.equal(tensors["0.B_down"], buffer[4:].t())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_save_and_load_clean_names(vit, trained, saved, tmp_path):
    trained.blocks[0].attn = torch.compile(trained.blocks[0].attn, backend="eager")
    gk.save_adapter(torch.compile(trained, backend="eager"), tmp_path / "b.safetensors")
    assert_same(tmp_path / "b.safetensors", saved)
    compiled = torch.compile(vit(), backend="eager")
    assert gk.load_adapter(compiled, saved) is compiled
    gk.load_adapter(trained, saved)


class LikeFabric(nn.Module):
    """What Lightning's Fabric.setup makes of a model: it is held twice, by the names used here."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = self._original_module = model

    def forward(self, x):
        return self._forward_module(x)


@pytest.mark.parametrize(
    "wrap",
    [
        AveragedModel,
        nn.DataParallel,
        lambda model: torch.compile(AveragedModel(torch.compile(model, backend="eager")), backend="eager"),
        checkpoint_wrapper,
        LikeFabric,
        lambda model: type("DeepSpeedEngine", (nn.DataParallel,), {})(model),
    ],
    ids=["AveragedModel", "DataParallel", "compiled", "checkpointed", "Fabric", "DeepSpeed"],
)
def test_a_wrapped_model_has_the_names_of_the_model_inside(wrap, vit, trained, saved, tmp_path):
    wrapped = wrap(trained)
    gk.save_adapter(wrapped, tmp_path / "b.safetensors")
    assert_same(tmp_path / "b.safetensors", saved)
    assert gk.trainable_parameters(wrapped) == gk.trainable_parameters(trained)
    plain = wrap(vit())
    assert gk.load_adapter(plain, saved) is plain
    x = torch.randn(3, 4, 12)
    assert torch.equal(plain.eval()(x), trained(x))
    gk.load_adapter(wrapped, saved)
    gk.merge(wrapped)


def test_parts_of_parameters_are_not_saved(tmp_path):
    model = gk.inject(nn.Sequential(nn.Linear(4, 4)), OTHER)
    model[0].B_up = nn.Parameter(torch.zeros(6))  # as the first FSDP leaves it on one of two ranks
    with pytest.raises(ValueError, match=r"'0\.B_up' has shape \(6,\) in place of \(4, 3\).*summon_full_params"):
        gk.save_adapter(model, tmp_path / "a.safetensors")
    assert leftovers(tmp_path) == []


def test_values_that_the_dtype_of_the_model_does_not_hold(tmp_path):
    model = gk.inject(nn.Sequential(nn.Linear(4, 4)), OTHER)
    with torch.no_grad():
        model[0].B_up[0, 0] = 1e5
    gk.save_adapter(model, tmp_path / "a.safetensors")
    half = gk.inject(nn.Sequential(nn.Linear(4, 4)), OTHER, adapter_dtype=torch.float16)
    refused(half, tmp_path / "a.safetensors", r"'0\.B_up' in torch\.float32 with values beyond torch\.float16")


def test_copies_keep_the_mark_of_trained_modules(trained, saved, tmp_path):
    gk.save_adapter(copy.deepcopy(trained), tmp_path / "b.safetensors")
    assert_same(tmp_path / "b.safetensors", saved)


def test_a_link_is_written_through(trained, saved, tmp_path):
    link = tmp_path / "latest.safetensors"
    link.symlink_to(saved)
    gk.save_adapter(trained, link)
    assert link.is_symlink()
    gk.load_adapter(trained, link)
