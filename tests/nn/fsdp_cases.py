"""FSDP2 on two ranks equals one process: steps, accumulation, dtypes, and what is refused."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn import functional as F
from two_ranks import (
    EXACT,
    RANKS,
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
from glora_kernels.nn.ranks import whole


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
