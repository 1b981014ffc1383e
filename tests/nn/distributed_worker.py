"""One of two processes that train together; `test_distributed.py` starts them. Every case compares with one process.

The oracle is the same model in one piece on the whole batch, in float64, whose gradient a sum over ranks can differ
from by rounding only: 1e-12 in tensors of the size of one.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels.nn.ranks import whole

EXACT = 1e-12
RANKS = 2


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.q_proj, self.v_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Linear(dim, dim)

    def forward(self, x):
        z = self.ln(x)
        x = x + (self.q_proj(z) @ z.transpose(-1, -2)).softmax(-1) @ self.v_proj(z)
        return x + F.gelu(self.mlp(x))


class Classifier(nn.Module):
    """Embedding, three blocks, head; `reentrant` None runs the blocks without activation checkpointing."""

    def __init__(self, dim=16, depth=3):
        super().__init__()
        self.embed = nn.Linear(8, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 5)
        self.reentrant = None

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    return Classifier().to(dtype)


def build(share="A", reentrant=None, dtype=torch.float64, seed=1, onto="cpu"):
    """The model, its adapters away from zero; `seed` decides their values. E is one number: a rank's part is empty."""
    config = gk.ShareLoRAConfig(rank=3, alpha=6, share=share, E="constant")
    model = gk.inject(plain(dtype).to(onto), config, train=["head"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("head."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    model.reentrant = reentrant
    return model


def batch(step, rank=None, dtype=torch.float64):
    """Eight samples, different at each step; a rank has its half of them."""
    x = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64).to(dtype)
    target = (torch.arange(8) * 3 + step) % 5
    half = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return x[half], target[half]


def backward(model, step, rank=None, dtype=torch.float64):
    x, target = batch(step, rank, dtype)
    loss = F.cross_entropy(model(x).float() if dtype != torch.float64 else model(x), target)
    loss.backward()
    return loss.detach()


def sgd(model):
    return torch.optim.SGD(gk.parameter_groups(model), lr=0.1, momentum=0.9)


def train(model, optimizer, steps, rank=None, max_norm=0.5):
    """Losses of the steps; on a rank, averaged over the ranks."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, rank)
        gk.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if rank is not None:
            dist.all_reduce(loss)
            loss /= RANKS
        losses.append(loss.item())
    return losses


def gradients(model):
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}


def values(model):
    return {n: whole(p.detach()).clone() for n, p in model.named_parameters()}


def assert_alike(ours, theirs, tolerance=EXACT):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, ours_ in ours.items():
        torch.testing.assert_close(ours_, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def shared_factors(model):
    """The parameters that several blocks have, each once."""
    every = [p for block in model.blocks for p in block.parameters()]
    return list({p: None for p in every if sum(p is other for other in every) > 1})


def raises(kind, text, act):
    with pytest.raises(kind, match=re.escape(text)):
        act()


# Data parallel -------------------------------------------------------------------------------------------------------


def ddp_equals_one_process(rank, _, share, reentrant):
    model = build(share, reentrant, seed=1 + rank)  # the other rank's values are those of the first from here on
    # With reentrant checkpoints autograd accumulates into a shared factor once a segment; a static graph counts that.
    ddp = nn.parallel.DistributedDataParallel(model, static_graph=reentrant is True)
    alone = build(share)
    backward(ddp, 0, rank)
    backward(alone, 0)
    assert_alike(gradients(model), gradients(alone))
    train(ddp, sgd(ddp), range(3), rank)
    train(alone, sgd(alone), range(3))
    assert_alike(values(model), values(alone))
    assert len(shared_factors(model)) == {"A": 3, "AB": 6}[share]


def ddp_has_a_shared_factor_in_one_bucket_once(rank, _):
    model = build("AB")
    seen = []

    def hook(state, bucket):
        seen.extend(bucket.parameters())
        return allreduce_hook(state, bucket)

    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(None, hook)
    backward(ddp, 0, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, seen)) == sorted(map(id, trained))
    groups = gk.parameter_groups(ddp)
    assert len(groups) == 1
    assert list(map(id, groups[0]["params"])) == list(map(id, trained))
    assert gk.trainable_parameters(ddp) == gk.trainable_parameters(build("AB"))


# Fully sharded -------------------------------------------------------------------------------------------------------


def fsdp_equals_one_process(rank, mesh, share="A", reentrant=None, **options):
    model = build(share, reentrant, seed=1)
    common = shared_factors(model)
    with torch.no_grad():
        for factor in common:
            factor.add_(rank)  # the first rank's values are everybody's
    assert gk.fully_shard(model, mesh=mesh, **options) is model
    assert all(isinstance(module, FSDPModule) for module in (model, *model.blocks))
    parts = {p for p in model.parameters() if hasattr(p, "full_tensor")}
    assert {p for p in model.parameters() if p not in parts} == set(common)
    params = [group["params"] for group in gk.parameter_groups(model)]
    assert set(params[0]) < parts
    assert set(params[1]) == set(common)
    assert len(params[1]) == {"A": 3, "B": 3, "AB": 6}[share]
    alone = build(share)
    backward(model, 0, rank)
    backward(alone, 0)
    assert_alike(gradients(model), gradients(alone))
    ours = train(model, sgd(model), range(5), rank)
    theirs = train(alone, sgd(alone), range(5))
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=0)
    assert_alike(values(model), values(alone))
    assert len(shared_factors(model)) == len(common)


def fsdp_steps_and_clips_over_lists(rank, mesh):
    """By the operations on lists of tensors that optimizers take on a GPU; both norms, parts of no rows among them."""
    model, alone = gk.fully_shard(build(), mesh=mesh), build()
    backward(model, 0, rank)
    backward(alone, 0)
    for norm_type in (2.0, float("inf")):
        ours = gk.clip_grad_norm_(model.parameters(), 0.1, norm_type)
        theirs = nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm_type)
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=0)
    assert_alike(gradients(model), gradients(alone))
    for one in (model, alone):
        torch.optim.AdamW(gk.parameter_groups(one), lr=1e-2, foreach=True, eps=1e-3).step()
    assert_alike(values(model), values(alone))
    model.head.bias.grad.fill_(float("nan"))
    kept = gradients(model)
    raises(RuntimeError, "is nan", lambda: gk.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True))
    for name, grad in gradients(model).items():
        assert torch.equal(grad, kept[name]) or name == "head.bias", name
    assert gk.clip_grad_norm_([], 1.0) == 0


def fsdp_of_factors_tied_inside_a_block(rank, mesh):
    def tied():
        model = build("none")
        for block in model.blocks:
            block.v_proj.B_down = block.q_proj.B_down
        return model

    model, alone = gk.fully_shard(tied(), mesh=mesh), tied()
    assert all(hasattr(p, "full_tensor") for p in model.parameters()), "one group has it: FSDP shards it"
    train(model, sgd(model), range(2), rank)
    train(alone, sgd(alone), range(2))
    assert_alike(values(model), values(alone))


def fsdp_accumulates_gradients(rank, mesh):
    model, alone = gk.fully_shard(build(), mesh=mesh), build()
    for step in range(5):  # sharded or shared, a gradient waits for the next step with a sync
        model.set_requires_gradient_sync(step in (1, 2, 4))
        before = {name: None if p.grad is None else whole(p.grad).clone() for name, p in model.named_parameters()}
        backward(model, step, rank)
        backward(alone, step)
        if step in (1, 2, 4):
            assert_alike(gradients(model), gradients(alone))
        else:
            for name, p in model.named_parameters():
                now, then = (t if t is None else whole(t) for t in (p.grad, before[name]))
                assert now is then is None or torch.equal(now, torch.zeros_like(now) if then is None else then), name


def fsdp_adds_what_is_new_to_a_gradient(rank, mesh):
    """Reduced in bf16, every new part is rounded once; 32 backwards lose no more than one does."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    model = gk.fully_shard(build(dtype=torch.float32), mesh=mesh, mp_policy=policy)
    for clear in (True, False):
        model.zero_grad(set_to_none=clear)
        backward(model, 0, rank, torch.float32)
        once = gradients(model)
        for _ in range(31):
            backward(model, 0, rank, torch.float32)
        for name, grad in gradients(model).items():
            size = float(grad.abs().max())
            torch.testing.assert_close(grad, 32 * once[name], rtol=0, atol=size * 1e-5, msg=name)


def fsdp_averages_what_is_trained_later(rank, mesh):
    """A shared factor frozen when the model was sharded, or put in later, and a module that is frozen and back."""
    model, alone = build("AB"), build("AB")
    for one in (model, alone):
        factor = one.blocks[0].q_proj.B_down
        factor.requires_grad_(False)
        one.head.requires_grad_(False)
    gk.fully_shard(model, mesh=mesh)
    backward(model, 0, rank)
    assert model.blocks[0].q_proj.B_down.grad is None
    backward(alone, 0)
    for one in (model, alone):
        one.blocks[0].q_proj.B_down.requires_grad_(True)
        one.head.requires_grad_(True)
        one.blocks[0].mlp.B_down.requires_grad_(False).requires_grad_(True)
        state = {name: value.detach().clone() for name, value in one.state_dict().items()}
        one.load_state_dict(state, assign=True)
    assert len(shared_factors(model)) == len(shared_factors(alone)) == 6
    for one in (model, alone):
        one.zero_grad()
    backward(model, 1, rank)
    backward(alone, 1)
    assert_alike(gradients(model), gradients(alone))


def deferred_gradients(rank, mesh):
    """Computed at the end of backward, they go the way of all gradients."""
    alone = build("AB")
    backward(alone, 0)
    sharded = gk.fully_shard(build("AB"), mesh=mesh)
    for model, called in ((sharded, sharded), *((m, nn.parallel.DistributedDataParallel(m)) for m in [build("AB")])):
        with gk.deferred_shared_grads(model) as deferred:
            loss = F.cross_entropy(called(batch(0, rank)[0]), batch(0, rank)[1])
        loss.backward()
        assert deferred.bytes > 0
        assert_alike(gradients(model), gradients(alone))


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


def fsdp_in_mixed_precision(rank, mesh):
    """The parts are gathered in bf16 and reduced in fp32; a shared factor stays fp32. The same by hand, bit for bit."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = gk.fully_shard(build(dtype=torch.float32), mesh=mesh, mp_policy=policy)
    backward(model, 0, rank, torch.float32)
    halves = []
    for half in range(RANKS):
        twin = build(dtype=torch.float32)
        wide = set(shared_factors(twin))
        for parameter in twin.parameters():
            parameter.data = parameter.data if parameter in wide else parameter.data.bfloat16()
        backward(twin, 0, half, torch.bfloat16)
        halves.append({name: grad.float() for name, grad in gradients(twin).items()})
    assert_alike(gradients(model), {name: (grad + halves[1][name]) / 2 for name, grad in halves[0].items()}, 0.0)


def fsdp_of_a_16_bit_base(rank, mesh):
    """fp32 adapters over bf16 weights: FSDP takes them in one group, since only the adapters are trained."""
    config = gk.ShareLoRAConfig(rank=3, share="A")
    model = gk.inject(plain(torch.bfloat16), config, adapter_dtype=torch.float32)
    gk.fully_shard(model, mesh=mesh)
    losses = []
    optimizer = torch.optim.AdamW(gk.parameter_groups(model), lr=2e-2)
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(backward(model, 0, rank, torch.bfloat16).item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {p.dtype for group in gk.parameter_groups(model) for p in group["params"]} == {torch.float32}
    for factor in shared_factors(model):
        both = [torch.empty_like(factor) for _ in range(RANKS)]
        dist.all_gather(both, factor.detach())
        assert torch.equal(*both), "the ranks have drifted apart"


def fsdp_of_4_bits(rank, mesh, folder):
    """Every rank holds all codes: the gradients of one process in fp32; a checkpoint brings them along."""

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
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "packed")
    other = gk.fully_shard(packed(7), mesh=mesh)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "packed")
    set_model_state_dict(other, state)
    assert torch.equal(other(batch(1, rank, torch.float32)[0]), model(batch(1, rank, torch.float32)[0]))


def fsdp_blocks_by_name(rank, mesh):
    model = gk.fully_shard(build(), ["blocks.?", "*.ln"], mesh=mesh)
    named = [model, *model.blocks, *(block.ln for block in model.blocks)]
    assert {m for m in model.modules() if isinstance(m, FSDPModule)} == set(named)
    alone, other = build(), gk.fully_shard(build(), list(model.blocks)[:0], mesh=mesh)
    assert [m for m in other.modules() if isinstance(m, FSDPModule)] == [other]
    assert len(gk.parameter_groups(other)) == 1, "in one group, nothing has to stay whole"
    for step in range(2):
        for sharded in (model, other):
            backward(sharded, step, rank)
        backward(alone, step)
    assert_alike(gradients(model), gradients(alone))
    assert_alike(gradients(other), gradients(alone))


def fsdp_refuses(rank, mesh):
    shard = partial(gk.fully_shard, mesh=mesh)
    model = build()
    before = copy.deepcopy(model.state_dict())
    raises(ValueError, "has no GLoRA layer", lambda: shard(plain()))
    raises(ValueError, "'layers.?' matches no module", lambda: shard(model, "layers.?"))
    raises(ValueError, "'blocks' is a ModuleList", lambda: shard(model, ["blocks"]))
    raises(TypeError, "got 3", lambda: shard(model, [3]))
    raises(ValueError, "no nn.ModuleList", lambda: shard(gk.inject(nn.Sequential(nn.Linear(4, 4)), gk.GLoRAConfig())))
    raises(ValueError, "is wrapped", lambda: shard(nn.parallel.DistributedDataParallel(build())))
    raises(ValueError, "meta device", lambda: shard(build(onto="meta")))
    mixed = build()
    mixed.blocks[1].q_proj.B_up = nn.Parameter(mixed.blocks[1].q_proj.B_up.detach().float())
    raises(ValueError, "'blocks.1.q_proj.B_up' (torch.float32)", lambda: shard(mixed))
    merged = build()
    gk.merge(merged)
    raises(RuntimeError, "is merged", lambda: shard(merged))
    assert not any(isinstance(m, FSDPModule) for m in (*model.modules(), *mixed.modules(), *merged.modules()))
    assert_alike(model.state_dict(), before, 0.0)
    shard(model)
    raises(ValueError, "sharded", lambda: shard(model))
    with torch.no_grad():
        model(batch(0)[0])  # the root group is gathered now, and merging it would be lost
    raises(ValueError, "merge: the model is sharded", lambda: gk.merge(model))


def fsdp_of_one_rank(mesh):
    model, alone = gk.fully_shard(build(), mesh=mesh), build()
    assert train(model, sgd(model), range(2)) == train(alone, sgd(alone), range(2))
    assert_alike(values(model), values(alone), 0.0)


def cases(folder, hybrid):
    ddp, fsdp = ddp_equals_one_process, fsdp_equals_one_process
    return {
        "DDP A": partial(ddp, share="A", reentrant=None),
        "DDP A, checkpointed": partial(ddp, share="A", reentrant=False),
        "DDP A, reentrant": partial(ddp, share="A", reentrant=True),
        "DDP AB": partial(ddp, share="AB", reentrant=None),
        "DDP AB, checkpointed": partial(ddp, share="AB", reentrant=False),
        "DDP AB, reentrant": partial(ddp, share="AB", reentrant=True),
        "DDP buckets": ddp_has_a_shared_factor_in_one_bucket_once,
        "FSDP A": fsdp,
        "FSDP A, reentrant": partial(fsdp, reentrant=True),
        "FSDP AB, checkpointed": partial(fsdp, share="AB", reentrant=False, reshard_after_forward=False),
        "FSDP A, offloaded": partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "FSDP B, hybrid mesh": lambda rank, _: fsdp(rank, hybrid, share="B"),
        "FSDP one rank": lambda rank, _: fsdp_of_one_rank(hybrid["shard"]),
        "FSDP lists": fsdp_steps_and_clips_over_lists,
        "FSDP tied inside a block": fsdp_of_factors_tied_inside_a_block,
        "FSDP accumulation": fsdp_accumulates_gradients,
        "FSDP accumulation in bf16": fsdp_adds_what_is_new_to_a_gradient,
        "FSDP trained later": fsdp_averages_what_is_trained_later,
        "deferred gradients": deferred_gradients,
        "FSDP save": partial(fsdp_saves_one_file_from_one_rank, folder=folder),
        "FSDP resume": partial(fsdp_resumes_from_a_distributed_checkpoint, folder=folder),
        "FSDP mixed precision": fsdp_in_mixed_precision,
        "FSDP 16-bit base": fsdp_of_a_16_bit_base,
        "FSDP 4 bits": partial(fsdp_of_4_bits, folder=folder),
        "FSDP blocks by name": fsdp_blocks_by_name,
        "FSDP refuses": fsdp_refuses,
    }


def main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=RANKS)
    hybrid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, case in cases(folder, hybrid).items():
        start = time.perf_counter()
        print(f"{name}: ", end="", flush=True)
        case(rank, mesh)
        dist.barrier()
        print(f"passed in {time.perf_counter() - start:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.redirect_stderr(sys.stdout):
        main(int(sys.argv[1]), Path(sys.argv[2]))
