"""Adapter files: what is written comes back, and a file that is damaged or does not fit changes nothing."""

import copy
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear
from glora_kernels.nn.model import named_layers

CFG = GLoRAConfig(C="vector", rank=2)
OTHER = GLoRAConfig.lora(rank=3, alpha=6, dropout=0.25)


@pytest.fixture
def trained(vit, randomize):
    """A classifier with two configurations and a head trained whole, every value away from its start."""
    model = randomize(gk.inject(vit(), {"blocks.0.*": CFG, "*.mlp.*": None, "*": OTHER}, train=["classifier"]))
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_()
        model(torch.randn(6, 4, 12))  # the batch norm's running statistics move
    return model.eval()


@pytest.fixture
def saved(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(trained, path)
    return path


def contents(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def assert_same(left, right):
    """Two files with the same contents; their metadata has no order, so the bytes may differ."""
    (tensors, metadata), (others, other_metadata) = contents(left), contents(right)
    assert metadata == other_metadata, "which includes the digest of every tensor"
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(path, type(m), id(m)) for path, m in model.named_modules()]
    return state, modules, [(name, p.requires_grad) for name, p in model.named_parameters()]


def refused(model, path, match, error=ValueError):
    """Loading fails with a message that matches, and nothing has changed."""
    state, *rest = snapshot(model)
    with pytest.raises(error, match=match):
        gk.load_adapter(model, path)
    after, *rest_after = snapshot(model)
    assert rest == rest_after
    assert state.keys() == after.keys()
    for name, value in state.items():
        assert value.is_meta or torch.equal(value, after[name]), name


# Round trips.


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


# Atomicity.


def leftovers(directory):
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("where", ["glora_kernels.nn.file.save_file", "os.fsync", "os.replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(where, trained, saved, monkeypatch, randomize):
    before = saved.read_bytes()
    randomize(trained, seed=1)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(OSError, match="no space"):
            gk.save_adapter(trained, saved)
    assert saved.read_bytes() == before
    assert leftovers(saved.parent) == ["a.safetensors"]
    gk.save_adapter(trained, saved)
    assert saved.read_bytes() != before


def test_the_target_is_complete_on_disk_before_it_gets_its_name(trained, saved, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((pathlib.Path(a), b)), replace(a, b)))
    gk.save_adapter(trained, saved)
    assert events[0] == "fsync"
    temporary, target = events[1]
    assert target == saved
    assert temporary.parent == saved.parent
    assert str(os.getpid()) in temporary.name


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
@pytest.mark.parametrize("moment", ["before the temporary file is whole", "before the rename"])
def test_a_process_killed_while_saving_leaves_the_old_file(moment, tmp_path):
    path = tmp_path / "a.safetensors"
    model = gk.inject(nn.Sequential(nn.Linear(4, 3)), CFG)
    gk.save_adapter(model, path)
    before = path.read_bytes()
    script = textwrap.dedent(
        """
        import os, signal, sys, torch
        import glora_kernels as gk
        from glora_kernels.nn import file
        path, moment = sys.argv[1:]
        model = gk.load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 3)), path)
        with torch.no_grad():
            model[0].C.fill_(1.0)
        def die(*args, **kwargs):
            if args and isinstance(args[0], dict):
                open(args[1], "wb").write(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before the rename":
            os.replace = die
        else:
            file.save_file = die
        gk.save_adapter(model, path)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(path), moment], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert path.read_bytes() == before
    assert len(leftovers(tmp_path)) == 2, "the process died while its temporary file was there"
    gk.save_adapter(model, path)
    gk.load_adapter(model, path)


def test_bad_targets(vit, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        gk.save_adapter(trained, tmp_path / "missing" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="directory"):
        gk.save_adapter(trained, tmp_path)
    with pytest.raises(ValueError, match="no GLoRA layer"):
        gk.save_adapter(vit(), tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        gk.save_adapter({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="meta"):
        gk.save_adapter(trained.to("meta"), tmp_path / "a.safetensors")
    assert leftovers(tmp_path) == []


# Damaged files.


def test_missing_files_and_directories(vit, tmp_path):
    refused(vit(), tmp_path / "none.safetensors", "none.safetensors", FileNotFoundError)
    refused(vit(), tmp_path, "directory")


def test_truncated_files(vit, saved):
    data = saved.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (0, 5, 8, 100, header - 1, header, header + 10, len(data) - 1):
        saved.write_bytes(data[:size])
        refused(vit(), saved, r"a\.safetensors.*(truncated|damaged)")
    saved.write_bytes(data + b"\0")
    refused(vit(), saved, "damaged")


def test_every_flipped_byte_is_noticed(tmp_path, randomize):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(randomize(gk.inject(nn.Sequential(nn.Linear(2, 2)), GLoRAConfig.lora(1))), path)
    data = bytearray(path.read_bytes())
    plain = nn.Sequential(nn.Linear(2, 2))
    for i in range(len(data)):
        data[i] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            gk.load_adapter(plain, path)
        data[i] ^= 1
    assert type(plain[0]) is nn.Linear
    path.write_bytes(data)
    gk.load_adapter(plain, path)


def rewrite(path, tensors=None, **changes):
    """The file again, with changed tensors or metadata and the digest as it was."""
    old, metadata = contents(path)
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    save_file(old if tensors is None else tensors, path, metadata=metadata)


def test_altered_contents(vit, saved):
    data = saved.read_bytes()
    tensors, metadata = contents(saved)
    name = "blocks.0.attn.q_proj.B_up"
    rewrite(saved, tensors | {name: tensors[name] + 1e-7})
    refused(vit(), saved, "SHA-256")
    renamed = {key.replace("q_proj", "x_proj"): value for key, value in tensors.items()}
    rewrite(saved, renamed)
    refused(vit(), saved, "SHA-256")
    rewrite(saved, tensors | {name: tensors[name].reshape(2, 16)})
    refused(vit(), saved, "SHA-256")
    saved.write_bytes(data)
    rewrite(saved, config=metadata["config"].replace('"alpha": 6', '"alpha": 9'))
    refused(vit(), saved, "SHA-256")
    saved.write_bytes(data)
    rewrite(saved, sha256=None)
    refused(vit(), saved, "SHA-256")


def test_foreign_files(vit, saved):
    tensors, _ = contents(saved)
    rewrite(saved, format_version="3")
    refused(vit(), saved, "'3'.*reads 1, 2")
    rewrite(saved, format_version="one")
    refused(vit(), saved, "'one'")
    rewrite(saved, format="pt")
    refused(vit(), saved, r"a\.safetensors.*no adapter")
    save_file(tensors, saved)
    refused(vit(), saved, "no adapter")
    torch.save(tensors, saved)
    refused(vit(), saved, "safetensors")
    saved.write_bytes(struct.pack("<Q", 4) + b"[{}]")
    refused(vit(), saved, "safetensors")


def forge(path, change):
    """A file whose digest is right and whose configuration is not."""
    from glora_kernels.nn import file

    tensors, metadata = contents(path)
    values = json.loads(metadata["config"])
    values = change(values) or values
    metadata["config"] = json.dumps(values, sort_keys=True)
    metadata["sha256"] = file._digest(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("layers") and None,
        lambda values: values["layers"]["embed"].pop("bias") and None,
        lambda values: values["layers"]["embed"].update(extra=1),
        lambda values: values["layers"]["embed"]["config"].update(A="dense"),
        lambda values: values["layers"]["embed"]["config"].update(rank=0),
        lambda values: values["layers"]["embed"].update(config="lora"),
        lambda values: values["tied"].update({"a.b": "c.d"}),
        lambda values: values["tied"].update({"a.b": "embed.B_up"}),
        lambda values: values["tied"].update({"embed.B_up": "embed.B_down"}),
        lambda values: ["a list"],
    ],
)
def test_unusable_configurations(change, vit, saved):
    forge(saved, change)
    refused(vit(), saved, r"a\.safetensors.*configuration that cannot be used")


# Files that do not fit the model.


def test_other_layers(vit, saved, trained):
    model = gk.inject(vit(), {"blocks.0.attn.*": CFG, "*": OTHER}, train=["classifier"])
    refused(model, saved, r"adapts the layers not \['blocks\.1\.mlp\.0'.*which the model has")
    model = gk.inject(vit(), {"blocks.0.attn.*": CFG, "*": OTHER}, ["*_proj"], train=["classifier"])
    refused(model, saved, r"adapts the layers .*'embed'.*which the model lacks")


def test_other_configurations(vit, saved):
    config = {"blocks.0.*": CFG, "*.mlp.*": None}
    model = gk.inject(vit(), config | {"*": GLoRAConfig.lora(4, 6)}, train=["classifier"])
    refused(model, saved, r"does not fit the layer 'embed': it has rank=3 \(the model: 4\)")
    model = gk.inject(vit(), config | {"*": GLoRAConfig.lora(3, 5)}, train=["classifier"])
    refused(
        model, saved, r"alpha=6 \(the model: 5\)\. Load it into the plain base model.*GLoRAConfig\(A='none', B='lora'"
    )


def test_other_trained_modules(vit, saved):
    config = {"blocks.0.*": CFG, "*.mlp.*": None, "classifier.*": None, "*": OTHER}
    refused(gk.inject(vit(), config), saved, r"trains the modules \['classifier'\], which the model lacks")
    model = gk.inject(vit(), config, train=["classifier", "ln"])
    refused(model, saved, r"trains the modules not \['blocks\.0\.ln', 'blocks\.1\.ln'\]")


def test_plain_models_that_do_not_fit(vit, saved):
    refused(vit(depth=1), saved, r"'blocks\.1\.attn\.._proj', where the model has no module")
    refused(vit(dim=8), saved, r"'blocks\.0\.attn\.k_proj'|out_features=16 \(the model: 8\)")
    refused(vit(classes=6), saved, r"'classifier\.1\.(weight|bias)' with shape .*5.*6")
    model = vit()
    model.blocks[0].attn.o_proj = nn.Linear(16, 16)
    refused(model, saved, r"'blocks\.0\.attn\.o_proj': it has bias=False \(the model: True\)")
    model = vit()
    model.embed = nn.LayerNorm(12)
    refused(model, saved, "'embed', where the model has a LayerNorm")
    model = vit()
    del model.classifier
    refused(model, saved, "trains the module 'classifier'")
    model = vit()
    model.classifier[0] = nn.BatchNorm1d(16, affine=False)
    refused(model, saved, r"holds the tensors \['classifier\.0\.bias'")
    model = vit()
    model.embed.register_forward_hook(lambda *args: None)
    refused(model, saved, "hooks")


def test_layers_that_the_model_shares_and_the_file_does_not(tmp_path):
    shared = nn.Linear(4, 4)
    gk.save_adapter(gk.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), CFG), tmp_path / "a.safetensors")
    refused(nn.Sequential(shared, shared), tmp_path / "a.safetensors", "'1', which in the model is one module with '0'")
    model = gk.inject(nn.Sequential(shared, shared), CFG)
    gk.save_adapter(model, tmp_path / "a.safetensors")
    linear = nn.Linear(4, 4)
    loaded = gk.load_adapter(nn.Sequential(linear, linear), tmp_path / "a.safetensors")
    assert loaded[0] is loaded[1]


def test_models_on_meta_are_refused(vit, saved):
    with torch.device("meta"):
        model = vit()
    refused(model, saved, "meta device")
    gk.inject(model, {"blocks.0.*": CFG, "*.mlp.*": None, "*": OTHER}, train=["classifier"])
    refused(model, saved, "meta device")
