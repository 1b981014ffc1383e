"""Meshes of two dimensions, FSDP2 over tensor parallelism, and checkpoints that go from one mesh to another."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from tp_cases import equal_steps
from two_meshes import EXACT, MODELS, adamw, alike, injected, planned, quantized, sharded, train, values

import glora_kernels as gk
from glora_kernels.nn.ranks import is_part

RESUMED = ("A vector", "ShareLoRA AB")
TRAINED = StateDictOptions(ignore_frozen_params=True)


def fsdp_over_tensor_parallel(mesh):
    for name in ("A vector", "A lora, C, D, E", "ShareLoRA AB"):
        print(f"[{name}]", end=" ", flush=True)
        ours, alone = injected(MODELS[name]), injected(MODELS[name])
        sharded(ours, mesh)
        assert all(isinstance(module, FSDPModule) for module in (ours, *ours.model.layers))
        equal_steps(ours, alone, mesh)
        if name == "ShareLoRA AB":
            shared = {p for p in ours.parameters() if p.requires_grad}
            assert {p.device_mesh.mesh_dim_names for p in shared} == {("tp",)}, "FSDP leaves what blocks share alone"


def of_4_bits(mesh):
    """A rank holds its part of the part of codes that its tensor-parallel rank has; no state dict does."""
    ours, alone = quantized(), quantized()
    equal_steps(sharded(ours, mesh), alone, mesh)
    codes = ours.model.layers[0].mlp.up_proj.weight
    assert codes.to_local().numel() * 4 == alone.model.layers[0].mlp.up_proj.weight.numel()
    held = ours.state_dict()
    assert held
    assert not any(name.endswith("_proj.weight") for name in held)
    assert not ours.load_state_dict(held).missing_keys


def saves(mesh, folder):
    """Two steps on two ranks, then a checkpoint; `resumes` continues on four, and one process does all in one go."""
    for name in RESUMED:
        model = planned(injected(MODELS[name]), mesh)
        optimizer = adamw(model)
        train(model, range(2), optimizer=optimizer)
        state = {
            "model": get_model_state_dict(model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED),
        }
        torch.distributed.checkpoint.save(state, checkpoint_id=folder / f"of {name}")


def resumes(mesh, folder):
    for name in RESUMED:
        model, alone = injected(MODELS[name]), injected(MODELS[name])
        sharded(model, mesh)
        assert all(is_part(p) for p in model.parameters() if p.requires_grad)
        optimizer = adamw(model)
        state = {
            "model": get_model_state_dict(model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED),
        }
        torch.distributed.checkpoint.load(state, checkpoint_id=folder / f"of {name}")
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)
        whole = adamw(alone)
        train(alone, range(2), optimizer=whole)
        alike(values(model), values(alone))
        ours, theirs = train(model, range(2, 5), mesh, optimizer), train(alone, range(2, 5), optimizer=whole)
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=0)
        alike(values(model), values(alone))
        gk.save_adapter(model, folder / "resumed.safetensors")
