"""A sharded model is saved by one rank, and goes on from a distributed checkpoint."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from two_ranks import (
    Classifier,
    assert_alike,
    backward,
    batch,
    build,
    gradients,
    plain,
    raises,
    sgd,
    shared_factors,
    train,
    values,
)

import glora_kernels as gk


def described(path):
    """The metadata of a file, a digest of every byte of its tensors among them."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def fsdp_saves_one_file_from_one_rank(rank, mesh, folder):
    def path(name):  # the second rank's does not exist: it is not to touch any
        return folder / name if rank == 0 else folder / "nowhere" / name

    model, alone = gk.fully_shard(build("AB"), mesh=mesh), build("AB")
    with torch.no_grad():
        model(batch(0)[0])  # leaves the root group gathered
    gk.save_adapter(model, path("sharded.safetensors"))
    if rank == 0:
        gk.save_adapter(alone, folder / "alone.safetensors")
        assert described(folder / "sharded.safetensors") == described(folder / "alone.safetensors")
    assert not (folder / "nowhere").exists()
    optimizer = sgd(model)
    train(model, optimizer, range(3), rank)
    gk.save_adapter(model, path("trained.safetensors"))
    dist.barrier()
    loaded = gk.load_adapter(plain(), folder / "trained.safetensors")
    assert_alike(values(loaded), values(model), 0.0)
    gk.fully_shard(loaded, mesh=mesh)
    assert train(loaded, sgd(loaded), [3], rank) == train(model, sgd(model), [3], rank)

    missing = folder / "missing" / "a.safetensors"
    raises(
        FileNotFoundError if rank == 0 else RuntimeError,
        "missing" if rank == 0 else "save_adapter: the first rank failed",
        lambda: gk.save_adapter(model, missing),
    )
    raises(ValueError, "load the adapter before fully_shard", lambda: gk.load_adapter(model, missing))


def fsdp_resumes_from_a_distributed_checkpoint(rank, mesh, folder):
    def adam(model):
        return torch.optim.AdamW(gk.parameter_groups(model), lr=1e-2)

    model = gk.fully_shard(build(), mesh=mesh)
    optimizer = adam(model)
    train(model, optimizer, range(3), rank)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder / "run")
    straight = train(model, optimizer, range(3, 8), rank)

    resumed = gk.fully_shard(build(seed=9), mesh=mesh)
    again = adam(resumed)
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, again), strict=True))
    dcp.load(state, checkpoint_id=folder / "run")
    set_state_dict(resumed, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert train(resumed, again, range(3, 8), rank) == straight
    assert_alike(values(resumed), values(model), 0.0)
    assert len(shared_factors(resumed)) == 3


def fsdp_of_4_bits(rank, mesh, folder):
    """Every rank holds a part of the codes: the gradients of one process in fp32; a checkpoint brings them along."""

    def packed(seed):
        torch.manual_seed(seed)
        model = gk.quantize(Classifier(), double_quant=True, target_modules=["blocks.*"])
        model = gk.inject(model, gk.ShareLoRAConfig(rank=3), target_modules=["blocks.*"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        return model

    whole_one = packed(0)
    model = gk.fully_shard(copy.deepcopy(whole_one), mesh=mesh)
    backward(model, 0, rank, torch.float32)
    backward(whole_one, 0, None, torch.float32)
    assert_alike(gradients(model), gradients(whole_one), 1e-5)
    for mine, other in zip(codes_of(model), codes_of(whole_one), strict=True):
        assert mine.to_local().numel() < other.numel()
        assert torch.equal(mine.full_tensor(), other)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "packed")
    other = gk.fully_shard(packed(7), mesh=mesh)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "packed")
    set_model_state_dict(other, state)
    assert torch.equal(other(batch(1, rank, torch.float32)[0]), model(batch(1, rank, torch.float32)[0]))
    mixed = gk.fully_shard(packed(0), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert all(codes.dtype == torch.uint8 for codes in codes_of(mixed))
    y, wanted = (m(batch(1, rank, torch.float32)[0]).float() for m in (mixed, model))
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)
    tied = packed(0)
    tied.blocks[1].mlp.hold(tied.blocks[0].mlp.codes())
    tied = gk.fully_shard(tied, mesh=mesh)
    assert tied.blocks[0].mlp.weight is tied.blocks[1].mlp.weight, "codes that blocks share are whole"
    backward(tied, 0, rank, torch.float32)


def codes_of(model):
    return [layer.weight for layer in model.modules() if getattr(layer, "quant_state", None) is not None]
