"""Convolutions of a model: which are adapted, training, merging, several adapters, files of our own."""

import copy
import json

import pytest
import torch
from convs import away, config, near
from safetensors import safe_open
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRAConv, GLoRALinear, ShareLoRAConfig
from glora_kernels.methods.factors import low_rank

PRODUCT = config("lora", "lora", "matmul")
X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """The parts of a UNet's block; `proj_in` is a convolution, `proj_out` a linear layer."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.proj_in = nn.Conv2d(8, 8, 1)
        self.to_q = nn.Linear(8, 8)
        self.proj_out = nn.Linear(8, 8)

    def forward(self, x):
        x = self.proj_in(torch.relu_(self.conv1(x)))
        return self.proj_out(torch.tanh(self.to_q(x.movedim(1, -1)))).movedim(-1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(8)])
        self.down = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Conv1d(8, 3, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(self.up(self.down(x))).flatten(2))


def net():
    torch.manual_seed(0)
    return Net().double()


def adapted(config=PRODUCT, targets=("conv1", "proj_in", "to_q", "out"), **others):
    return away(gk.inject(net(), config, target_modules=list(targets), **others))


def kinds(model):
    return {path: type(m) for path, m in model.named_modules() if isinstance(m, GLoRALinear)}


def test_patterns_mean_linear_layers_first():
    linear = {f"blocks.{i}.{name}": GLoRALinear for i in range(2) for name in ("to_q", "proj_out")}
    with pytest.warns(UserWarning, match="convolutions too"):
        assert kinds(gk.inject(net(), PRODUCT)) == linear
    assert kinds(gk.inject(net(), PRODUCT, target_modules="blocks.*")) == linear
    assert kinds(gk.inject(net(), PRODUCT, target_modules=["proj_in", r".*conv\d"])) == {
        f"blocks.{i}.{name}": GLoRAConv for i in range(2) for name in ("conv1", "proj_in")
    }
    found = kinds(gk.inject(net(), {"out": PRODUCT, "*": None}, target_modules=["out", "to_q"]))
    assert found == {"out": GLoRAConv}
    assert isinstance(gk.inject(nn.Conv2d(3, 4, 3), PRODUCT), GLoRAConv)
    excluded = gk.inject(net(), PRODUCT, target_modules=["conv1"], exclude_modules=["blocks.0.conv1"])
    assert kinds(excluded) == {"blocks.1.conv1": GLoRAConv}


@pytest.mark.parametrize(
    ("targets", "own", "match"),
    [
        (["down"], PRODUCT, r"'down' \(Conv2d\) cannot be replaced: it is a grouped convolution \(groups=2\)"),
        (["up"], PRODUCT, "matches no linear layer or convolution \\('up' is of class ConvTranspose2d\\)"),
        (["out"], ShareLoRAConfig(rank=2), "'out' is a convolution, for which there is no ShareLoRAConfig"),
        (["nothing"], PRODUCT, "matches no module"),
    ],
)
def test_refusals_name_the_layer_and_change_nothing(targets, own, match):
    model = net()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        gk.inject(model, own, target_modules=targets)
    assert not kinds(model)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_what_is_not_for_convolutions():
    with pytest.raises(ValueError, match="'out' is a convolution; accepted are linear layers"):
        gk.quantize(net(), target_modules=["out"])
    with pytest.raises(ValueError, match="'out' is a convolution, whose rows cannot have a configuration each"):
        gk.Supernet(net(), gk.SearchSpace(), target_modules=["out"])
    model = adapted()
    with pytest.raises(RuntimeError, match=r"'blocks.0.conv1' .* is a convolution, whose adapters cannot differ"):
        gk.rows(model, ["default", None]).__enter__()
    with pytest.raises(ValueError, match=r"mids: 'blocks\.0\.conv1' is a convolution; accepted are"):
        low_rank(model, "mids")
    with gk.shift_once(model), gk.deferred_shared_grads(model):
        near(model(X), model(X))
    assert not gk.warmup(adapted(targets=["conv1"]).float(), tokens=4)


def test_a_mesh_cuts_no_convolution():
    from glora_kernels.parallel.styles import GLoRAColwise

    with pytest.raises(ValueError, match="a GLoRAConv cannot be cut over ranks"):
        GLoRAColwise()._apply(adapted().out, None)


@pytest.mark.parametrize("own", [PRODUCT, config("vector", "lora", shift=("vector", "none", "vector"))], ids=str)
def test_training_merging_and_unloading(own):
    model = adapted(own)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    (group,) = gk.parameter_groups(model)
    assert len(group["params"]) == sum(len(m.adapter()) for m in model.modules() if isinstance(m, GLoRALinear))
    optimizer = torch.optim.AdamW([group], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(p, frozen[name]) and p.grad is None for name, p in model.named_parameters() if name in frozen
    )
    y = model(X)
    with gk.disabled(model):
        near(model(X), net()(X))
    model.eval()
    plain = copy.deepcopy(model)
    gk.merge(model)
    near(model(X), y)
    state = model.state_dict()
    merged = net()
    for name in [name for name in state if name.endswith("conv1.bias")]:  # C and E gave it one
        merged.get_submodule(name.rpartition(".")[0]).bias = nn.Parameter(state[name].clone())
    merged.load_state_dict(state)
    near(merged(X), y)
    gk.unmerge(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    plain = gk.merge_and_unload(plain)
    assert not kinds(plain)
    assert type(plain.blocks[0].conv1) is nn.Conv2d
    near(plain(X), y)


def test_a_state_dict_has_the_names_of_the_base():
    model, other = adapted(), adapted()
    assert net().state_dict().keys() < model.state_dict().keys()
    assert model.state_dict()["blocks.0.conv1.weight"].shape == (8, 4, 3, 3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    near(moved(X), model(X))
    assert "kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), in_features=4" in str(model.blocks[0].conv1)


def test_our_own_file(tmp_path):
    path, old = tmp_path / "a.safetensors", tmp_path / "old.safetensors"
    model = adapted({"out": config("vector", "lora"), "*": PRODUCT})
    gk.save_adapter(model, path)
    loaded = gk.load_adapter(net(), path)
    assert kinds(loaded) == kinds(model)
    assert torch.equal(loaded(X), model(X))
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["format_version"] == "4"
    entry = json.loads(about["config"])["layers"]["blocks.1.conv1"]
    assert (entry["in_features"], entry["kernel"]) == (8, [3, 3])
    gk.save_adapter(adapted(targets=["to_q"]), old)
    with safe_open(old, "pt") as file:
        assert file.metadata()["format_version"] == "1"
    away(loaded)
    gk.load_adapter(loaded, path)
    assert torch.equal(loaded(X), model(X))
    other = net()
    other.blocks[0].conv1 = nn.Conv2d(4, 8, 5, padding=2, bias=False).double()
    with pytest.raises(ValueError, match=r"layer 'blocks.0.conv1': it has kernel=\(3, 3\) \(the model: \(5, 5\)\)"):
        gk.load_adapter(other, path)
    other.blocks[0].conv1 = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="kernel"):
        gk.load_adapter(other, path)
    other.blocks[0].conv1 = nn.Conv2d(4, 8, 3, groups=4)
    with pytest.raises(ValueError, match=r"'blocks.0.conv1', which cannot be replaced: it is a grouped"):
        gk.load_adapter(other, path)
    assert not kinds(other)
    del other.out
    with pytest.raises(ValueError, match="adapts a convolution 'out', where the model has no module"):
        gk.load_adapter(other, path)


def test_several_adapters(tmp_path):
    model = adapted(targets=["conv1", "to_q"])
    first = model(X)
    gk.add_adapter(model, "b", GLoRAConfig.lora(3, 2), target_modules=["conv1", "out"])
    assert torch.equal(model(X), first)
    gk.set_adapter(model, "b")
    near(model(X), net()(X))
    for layer in (m for m in model.modules() if isinstance(m, GLoRAConv)):
        for parameter in layer.named()["b"].parameters():
            parameter.data.copy_(0.3 * torch.randn_like(parameter))
    second = model(X)
    gk.save_adapter(model, tmp_path / "b.safetensors", "b")
    near(gk.load_adapter(net(), tmp_path / "b.safetensors")(X), second)
    model.eval()
    gk.merge(model)
    near(model(X), second)
    gk.unmerge(model)
    gk.set_adapter(model, "default")
    assert torch.equal(model(X), first)
    gk.delete_adapter(model, "b")
    assert torch.equal(model(X), first)


@pytest.mark.parametrize("kernel", [[0, 3], [1, 1, 1, 1], ["3"], 3])
def test_a_file_with_another_kernel_is_refused(kernel):
    from glora_kernels.nn.file import LayerEntry

    entry = json.loads(json.dumps(LayerEntry(PRODUCT, 4, 8, False, False, kernel=(3, 3)).to_dict("4")))
    assert LayerEntry.parsed(dict(entry, kernel=[3, 3]), "a layer", "4").kernel == (3, 3)
    with pytest.raises(ValueError, match="kernel"):
        LayerEntry.parsed(dict(entry, kernel=kernel), "a layer", "4")
