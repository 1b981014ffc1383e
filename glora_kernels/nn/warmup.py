"""Compile every kernel of a model before its first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glora_kernels.launch import routes
from glora_kernels.launch.progress import progress as shown
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import named_layers, unwrap
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.ops.glora import seeds_on_device

_DIVISOR = 16
"""Triton compiles a kernel anew for sizes that are no multiple of this."""


def warmup(
    model: nn.Module,
    tokens: int | Iterable[int] = 8192,
    dtype: torch.dtype | None = None,
    training: bool = True,
    progress: bool = True,
) -> list[str]:
    """Run each different GLoRA layer of the model once on zeros, so that its kernels are compiled before step one.

    Layers that are fused as siblings are run together.

    Layers are alike where sizes, dtypes, device, layout, supports, dropout and what requires a gradient are. Nothing of
    the model changes: no gradient is left, no hook runs, the generators of the CPU and the GPU and every `training`
    flag are as before. What stays is compiled code, and the workspaces that the layers will use.

    Triton compiles for a number of tokens that is a multiple of 16 and for one that is not separately, and a last batch
    is seldom like the others. An integer therefore stands for both: 8192 also warms 8191. A list is taken as it is;
    give one where the steps differ much in size, since the configuration of a launch goes by it.

    In training the input wants a gradient, as in all layers but the first of a model. Layers that are merged or
    disabled are left out, and so are those that no Triton kernel serves: on a CPU nothing is compiled (but in Triton's
    interpreter under `backend("triton")`, where the steps are run all the same), and nothing is done.

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        tokens: rows of the layers' input, batch times sequence; an integer or several.
        dtype: of the activations. None: that of each layer's weight. Another than the weight's, float16 or bfloat16,
            stands for training under autocast.
        training: forward and backward in training mode; False: forward alone, in evaluation mode.
        progress: show how far it is, on stderr.

    Returns:
        One line for each run: which layers, with how many tokens.

    Raises:
        TypeError: `model` is no module, or `tokens` no integers.
        ValueError: the model has no GLoRA layer or is sharded, tokens below 1, or a dtype that autocast does not offer.
    """
    refuse_sharded(unwrap(model), "warmup", "call it before fully_shard")
    layers = named_layers(unwrap(model))
    if not layers:
        raise ValueError("warmup: the model has no GLoRA layer; call inject(model, config) first")
    sizes = _sizes(tokens)
    kinds: dict[object, list[list[GLoRALinear]]] = {}
    for unit in _units(layers.values()):
        for layer in unit:
            _check_dtype(layer, dtype)
        if all(not layer.merged and not layer._disabled and _is_served(layer, dtype) for layer in unit):
            kinds.setdefault(tuple(map(_signature, unit)), []).append(unit)
    lines = []
    plan = [(alike, size) for alike in kinds.values() for size in sizes]
    for alike, size in shown(plan, "compiling", progress):
        unit = alike[0]
        _run(unit, size, dtype, training)
        if any(layer._dropout for layer in unit) and training and unit[0].weight.device.type == "cuda":
            with seeds_on_device():  # as a CUDA graph or torch.compile will call them
                _run(unit, size, dtype, training)
        kind = "layer" if len(unit) == 1 else "group"
        count = f"{len(alike)} {kind}{'' if len(alike) == 1 else 's'}"
        what = "forward and backward" if training else "forward"
        lines.append(f"{count} like ({unit[0].extra_repr()}): {what} with {size} tokens")
    return lines


def _units(layers: Iterable[GLoRALinear]) -> list[list[GLoRALinear]]:
    """What one launch computes: the members of a group of siblings, any other layer by itself."""
    units: dict[int, list[GLoRALinear]] = {}
    for layer in layers:
        members = [layer] if layer._siblings is None or not layer._siblings.fused else layer._siblings.members
        present = [member for member in members if member is not None]
        units.setdefault(id(present[0]), present)
    return list(units.values())


def _sizes(tokens: int | Iterable[int]) -> list[int]:
    several = not isinstance(tokens, int)
    given = list(tokens) if isinstance(tokens, Iterable) else [tokens]
    for size in given:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"tokens must be an integer >= 1, or several, got {tokens!r}")
        if size < 1:
            raise ValueError(f"tokens must be >= 1, got {size}")
    if not given:
        raise ValueError("tokens must be an integer >= 1, or several, got none")
    if not several:
        size = given[0]
        given.append(size - 1 if size % _DIVISOR == 0 else size - size % _DIVISOR)
    return list(dict.fromkeys(size for size in given if size > 0))


def _check_dtype(layer: GLoRALinear, dtype: torch.dtype | None) -> None:
    if dtype not in (None, layer.base_dtype, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dtype must be None, that of the weights ({layer.base_dtype}), or torch.float16 or torch.bfloat16 for "
            f"autocast; got {dtype}"
        )


def _is_served(layer: GLoRALinear, dtype: torch.dtype | None) -> bool:
    """Whether kernels serve the layer where it is."""
    device = layer.weight.device.type
    four_bit = layer.quant_state is not None
    return device != "meta" and routes.route(device, dtype or layer.base_dtype, four_bit) != "eager"


def _signature(layer: GLoRALinear) -> tuple[object, ...]:
    """What the code of a layer's kernels, and their launches, depend on."""
    weight, config = layer.weight, layer.config
    parameters = [
        (name, tuple(p.shape), p.dtype, p.requires_grad)
        for name, p in (("bias", layer.bias), *layer.adapter().items())
        if p is not None
    ]
    layout: tuple[object, ...] = (
        tuple(weight.shape),
        weight.stride(),
        layer.base_dtype,
        weight.device,
        layer._transposed,
    )
    if (state := layer.quant_state) is not None:
        layout += (state.shape, state.dtype, state.quant_type, state.blocksize, state.nested is not None)
    return (*layout, *parameters, config.variant, layer._dropout > 0)


def _run(unit: list[GLoRALinear], tokens: int, dtype: torch.dtype | None, training: bool) -> None:
    """One forward, and backward, without a trace: on parameters that share the layers' memory, and without hooks."""
    device, base_dtype, was = unit[0].weight.device, unit[0].base_dtype, [layer.training for layer in unit]
    autocast: Any = contextlib.nullcontext()
    if dtype is not None and dtype != base_dtype:
        autocast = torch.autocast(device.type, dtype=dtype)
    x = torch.zeros(tokens, unit[0].in_features, device=device, dtype=base_dtype, requires_grad=training)
    bare = _Bare(unit)
    own: dict[str, Tensor] = {
        name: parameter.detach().requires_grad_(training and parameter.requires_grad)
        for name, parameter in bare.named_parameters()
    }
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.set_grad_enabled(training), autocast:
        for layer in unit:
            layer.training = training
        try:
            ys = functional_call(bare, own, (x,))
        finally:
            for layer, flag in zip(unit, was, strict=True):
                layer.training = flag
        if training:
            wanted = [x, *(value for value in own.values() if value.requires_grad)]
            torch.autograd.grad(ys, wanted, [torch.zeros_like(y) for y in ys], allow_unused=True)
    if on_gpu:
        torch.cuda.synchronize(device)


class _Bare(nn.Module):
    """Layers called with one input, without their hooks."""

    def __init__(self, layers: list[GLoRALinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer.forward(x) for layer in self.layers]
