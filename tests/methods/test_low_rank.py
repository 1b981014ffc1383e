"""Layers whose parameters cannot be changed now: the error names them and says what to do, and nothing has changed."""

import pytest
import torch
from method_nets import LORA, X, net, plain, random_, state, unchanged
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.methods.factors import low_rank

CHANGES = {
    "edit_ranks": lambda model: gk.edit_ranks(model, {"*": [0]}),
    "set_rank": lambda model: gk.set_rank(model, {"*": 2}),
    "set_mid": lambda model: gk.set_mid(model, "gain"),
    "tasks": lambda model: gk.set_mid(model, "tasks", tasks=2),
    "base": lambda model: gk.restart(model, into="base"),
    "chain": lambda model: gk.restart(model, into="chain"),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def refuses(act, model, message):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        act(model)
    assert unchanged(before, state(model))


def test_sharded_models(group):
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model.layers[1])
    for change in CHANGES.values():
        refuses(change, model, "the model is sharded.*before fully_shard")
    for kind in ("rite", "lora-fa"):
        refuses(lambda m, kind=kind: gk.optimizer(m, kind, 1e-3), model, f"'{kind}': the model is sharded")
    mapped = net()
    gk.set_mid(mapped, "gain")
    fully_shard(mapped)
    refuses(gk.fold_mids, mapped, "fold_mids: the model is sharded")
    assert gk.optimizer(model, "lora+", 1e-3).param_groups


def test_models_in_ddp(group):
    model = nn.parallel.DistributedDataParallel(net())
    for change in CHANGES.values():
        refuses(change, model, "is wrapped in DistributedDataParallel.*with the model inside, then wrap that again")
    CHANGES["edit_ranks"](model.module)
    again = nn.parallel.DistributedDataParallel(model.module)
    again(X).sum().backward()
    assert all(p.grad.shape == p.shape for p in again.parameters() if p.requires_grad)


@every_change
def test_merged_layers(change):
    model = net().eval()
    model.layers[1].q.merge()
    refuses(change, model, r"'layers\.1\.q' cannot be changed: it is merged; call unmerge\(model\) first")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x) * self.v_proj(x)


@every_change
def test_fused_layers(change):
    torch.manual_seed(0)
    model = random_(gk.inject(nn.Sequential(Attention(), Attention()).double(), GLoRAConfig.lora(4, 8)))
    gk.fuse_siblings(model)
    refuses(change, model, r"'\d\.\w_proj' cannot be changed: it is computed together.*call split_siblings\(model\)")
    gk.split_siblings(model)
    change(model)


@every_change
def test_layers_with_another_active_adapter(change):
    model = net()
    gk.add_adapter(model, "b", LORA)
    gk.set_adapter(model, "b")
    refuses(change, model, r"'layers.* its active adapter is 'b'; call set_adapter\(model, 'default'\)")
    gk.set_adapter(model, "default")
    with pytest.raises(ValueError, match=r"'layers.* has further adapters on its base .'b'.*into='chain'"):
        gk.restart(model, into="base")
    gk.delete_adapter(model, "b")
    change(model)


@every_change
def test_models_without_a_low_rank_adapter(change):
    for model in (plain(), gk.inject(plain(), GLoRAConfig("lora", "vector", rank=2))):
        refuses(change, model, "the model has no low-rank adapter: no GLoRALinear with B='lora', no active LoRA")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        change("model")


def test_a_layer_with_two_paths_is_found_once():
    model = plain()
    model.again = model.layers[0]
    model = gk.inject(model, LORA)
    assert sorted(low_rank(model, "test")) == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    assert sorted(low_rank(torch.compile(model), "test")) == sorted(low_rank(model, "test"))
