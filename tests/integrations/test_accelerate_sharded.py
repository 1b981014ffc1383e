"""Accelerated layers whose bases are in pieces: DTensor, FSDP2, the first FSDP; in a group of one process."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import assert_same, reasons, step

import glora_kernels as gk
from glora_kernels.integrations import bases

LORA = partial(LoraConfig, r=3, target_modules=["up"])


@pytest.fixture(autouse=True)
def _group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()  # the models before the group: the last owner may wait for it with Python's lock
    torch.distributed.destroy_process_group()


def test_a_distributed_weight_is_refused_and_fsdp2_gathers_it(adapted, x):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    plain = adapted(LORA())
    sharded = gk.accelerate(copy.deepcopy(plain), verbose=False)
    base = sharded.base_model.model.up.base_layer
    distributed = torch.distributed.tensor.distribute_tensor(base.weight.data, mesh)
    base.weight = nn.Parameter(distributed, requires_grad=False)
    assert reasons(sharded) == {bases.SHARDED}
    with pytest.raises(RuntimeError, match="DTensor"):
        sharded(x)
    whole = torch.distributed.fsdp.fully_shard(gk.accelerate(copy.deepcopy(plain), verbose=False), mesh=mesh)
    assert type(whole.base_model.model.up.base_layer.weight.data) is not torch.Tensor
    assert reasons(whole) == set()  # its forward gathers the weights
    torch.testing.assert_close(whole(x), plain(x), rtol=1e-12, atol=1e-12)


class Checkpointed(nn.Module):
    """Each layer recomputed in backward, as reentrant checkpoints do it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(20, 12), nn.Linear(12, 20)

    def forward(self, x):
        return checkpoint(self.down, torch.tanh(checkpoint(self.up, x, use_reentrant=True)), use_reentrant=True)


def fsdp(model):
    """The model in the first FSDP."""
    return torch.distributed.fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def whole_names(found):
    return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in found.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_fsdp_trains_on_pefts_path_and_evaluates_on_ours(twins, x):
    """Its views of frozen weights need gradients where they stand in one unit with trained ones."""
    pair = twins(LORA())
    expected = step(pair.plain, x)
    sharded = fsdp(pair.fast)
    assert_same(whole_names(step(sharded, x)), expected)
    assert not pair.calls
    with torch.no_grad():
        torch.testing.assert_close(sharded(x), expected["y"], rtol=1e-12, atol=1e-12)
    assert len(pair.calls) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_under_the_first_fsdp_meets_one_mask(twins, x, whole):
    """Without gradients, then with them, then with the parameters put back: PEFT's path, and its mask, each time."""
    pair = twins(LoraConfig(r=3, target_modules=["up", "down"], lora_dropout=0.3), net=Checkpointed())
    found = []
    for model in pair:
        net = model.train().base_model.model
        if not whole:
            net.up, net.down = fsdp(net.up), fsdp(net.down)
        sharded = fsdp(model)
        torch.manual_seed(7)
        found.append(whole_names(step(sharded, x)))
    assert_same(found[1], found[0])
    assert not pair.calls
