"""Contexts of one training step in which work of all layers is done at once: β before it, shared gradients after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.merging import SHIFTS, operands
from glora_kernels.nn.model import named_layers, unwrap
from glora_kernels.ops import depth
from glora_kernels.ops.deferred import Deferred, DeferredLinear

_FACTORS = {"B_down": "b_down", "B_up": "b_up"}


@contextlib.contextmanager
def shift_once(model: nn.Module) -> Iterator[None]:
    """Compute β = b + b∘D + E + W·C of every layer once, in one launch; inside, the layers use it as their bias.

        for batch in batches:
            with gk.shift_once(model):
                loss = model(batch)
            loss.backward()
            optimizer.step()

    Without it each layer computes W·C and adds its terms anew at each forward, since a changed parameter leaves no
    trace. Entering the context says that no weight, bias or parameter of C, D and E changes until the backward of what
    was computed inside has run: enter it once a step. Gradients reach the parameters as ever, in one launch (two where
    a C is lora). Several forwards and backwards may follow one another inside; each backward has its own launch.

    A forward that activation checkpointing computes again, of either kind, must find the context open: call backward
    inside it. A reentrant checkpoint asks for its layers' gradients by itself: one launch each.

    Layers without C, D and E, and merged or disabled ones, take no part; copies and pickles made inside do not carry
    β. Nests. What the kernels do not take (float64, CPUs, `backend("eager")`) is computed layer by layer.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: a CUDA graph is being captured. In backward: a tensor that β was made of was overwritten.
    """
    layers = [layer for layer in _layers(model, "shift_once") if _is_shifted(layer)]
    before = [layer._beta for layer in layers]
    for layer, beta in zip(layers, depth.shifts([operands(layer) for layer in layers]), strict=True):
        layer._beta = beta
    try:
        yield
    finally:
        for layer, beta_before in zip(layers, before, strict=True):
            layer._beta = beta_before


@contextlib.contextmanager
def deferred_shared_grads(model: nn.Module) -> Iterator[Deferred]:
    """Compute the gradient of every factor that layers share at the end, in one launch for all of them.

        with gk.deferred_shared_grads(model) as deferred:
            loss = model(batch)
            loss.backward()
        optimizer.step()

    dB_down = Σ_l s·(dy_l·B_up,l)ᵀ·x̃_l (dB_up = s·Σ_l dy_lᵀ·(x̃_l·B_down,lᵀ)) is then one product in fp32 over all
    layers that hold the factor, summed in their order and rounded once, added to `.grad` when the context is left.
    Forward and backward both belong inside. Without the context autograd accumulates the layers' gradients one by one,
    in the dtype of the parameter, and keeps nothing.

    It costs memory: what backward would have freed layer by layer lives until the end: M·(K + R)·itemsize bytes a
    layer where B_down is shared (x_l and S_l = dy_l·B_up,l), M·(N + R)·itemsize where B_up is (dy_l and h_l); an x that
    several layers read counts once. `deferred.bytes` is the sum so far.

    `torch.autograd.grad` finds no gradient of a shared factor inside. Layers that torch.compile traces, or that are
    fused with siblings, keep autograd's own accumulation. An exception inside drops what was handed over.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: the context is open already; or something waits for the gradient as autograd delivers it: more
            than one process in torch.distributed, or a hook on a shared parameter.
    """
    layers = _layers(model, "deferred_shared_grads")
    if any(layer._deferred is not None for layer in layers):
        raise RuntimeError("deferred_shared_grads was entered inside deferred_shared_grads of the same layers")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise RuntimeError(
                f"deferred_shared_grads: {processes} processes train together, and none would be sent the gradients "
                "that are computed at the end; leave the context out"
            )
    shared = _shared(layers)
    deferred = Deferred()
    for place, (layer, names) in enumerate(shared.items()):
        layer._deferred = DeferredLinear(deferred, place, names)
    try:
        yield deferred
        deferred.finish()
    finally:
        deferred.drop()
        for layer in shared:
            layer._deferred = None


def _layers(model: nn.Module, caller: str) -> list[GLoRALinear]:
    layers = named_layers(unwrap(model))
    if not layers:
        raise ValueError(f"{caller}: the model has no GLoRA layer; call inject(model, config) first")
    return list(layers.values())


def _is_shifted(layer: GLoRALinear) -> bool:
    return not (layer.merged or layer._disabled or SHIFTS.isdisjoint(layer.adapter()))


def _shared(layers: list[GLoRALinear]) -> dict[GLoRALinear, dict[str, nn.Parameter]]:
    """The layers with a trained factor that another layer has too, and their shared factors by argument."""
    owners: dict[nn.Parameter, list[GLoRALinear]] = {}
    for layer in layers:
        for name, parameter in layer.adapter().items():
            if name in _FACTORS and parameter.requires_grad:
                owners.setdefault(parameter, []).append(layer)
    found: dict[GLoRALinear, dict[str, nn.Parameter]] = {}
    for parameter, holders in owners.items():
        if len(holders) < 2:
            continue
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise RuntimeError(
                "deferred_shared_grads: a shared factor has a hook on its gradient, which would not be called; remove "
                "it, or leave the context out"
            )
        for layer in holders:
            name = next(name for name in _FACTORS if getattr(layer, name) is parameter)
            found.setdefault(layer, {})[_FACTORS[name]] = parameter
    return {layer: found[layer] for layer in layers if layer in found}
