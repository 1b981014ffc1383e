"""Compile every kernel of a model before its first step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glora_kernels.glora.op import seeds_on_device
from glora_kernels.nn.adapted import Frozen, Operands
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import named_layers, unwrap
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.runtime import configs, routes
from glora_kernels.runtime.progress import note
from glora_kernels.runtime.progress import progress as shown


class Form(NamedTuple):
    """What `warmup` needs to know of a layer; layers of PEFT return it from their method `warmup_form`.

    layer: is called with one x (M, in_features). drops: has dropout. key: equal for layers with the same kernels and
    launches. text: a short description.
    """

    layer: nn.Module
    in_features: int
    device: torch.device
    dtype: torch.dtype
    is_4bit: bool
    drops: bool
    key: tuple[object, ...]
    text: str


def warmup(
    model: nn.Module,
    tokens: int | Iterable[int] = 8192,
    dtype: torch.dtype | None = None,
    training: bool = True,
    progress: bool = True,
) -> list[str]:
    """Run each different GLoRA layer of the model on zeros, so that its kernels are compiled before the first step.

    This includes the layers of an accelerated PEFT model and of our PEFT methods, with their active adapters, and 4-bit
    linear layers (`quantize`) without an adapter. Layers that are fused as siblings are run together.

    Of layers with equal sizes, dtypes, device, layout, supports, dropout and trained parameters one is run. The model
    does not change: no gradients are left, no hooks run, and random generators and `training` flags are restored. The
    compiled code stays, and so do the workspaces that the layers will use.

    The numbers of tokens fall into seven classes with the same launches (`runtime.configs.representative`). An integer
    stands for all numbers up to it: after 8192, no number of tokens compiles anything more. A list is for steps of
    known sizes: only these are run.

    In training the input requires a gradient, as for all layers but the first of a model. Merged or disabled layers are
    skipped, and so are layers of experts and those that do not use Triton kernels: on a CPU nothing is done (except in
    Triton's interpreter under `backend("triton")`, where the layers are run but nothing is compiled).

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        tokens: rows of the layers' input, batch times sequence: the largest number, or a list of all numbers.
        dtype: of the activations. None: that of each layer's weight. float16 or bfloat16, if it is not the weight's
            dtype, means training under autocast.
        training: True: forward and backward in training mode; False: forward alone, in eval mode.
        progress: show the progress, and at the end the time, on stderr.

    Returns:
        One line for each kind of layer: the layers, the numbers of tokens, and the time.

    Raises:
        TypeError: `model` is no module, or `tokens` no integers.
        ValueError: the model is sharded or has no layer that runs on our operators, tokens below 1, or a dtype that
            autocast does not support.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> gk.warmup(model, tokens=8192, progress=False)  # nothing is compiled on a CPU
        []
    """
    refuse_sharded(unwrap(model), "warmup", "call it before fully_shard")
    layers = named_layers(unwrap(model))
    others = list(_others(unwrap(model)))
    if not layers and not others:
        raise ValueError(
            "warmup: the model has no GLoRA layer; call inject(model, config) first, or accelerate(model) on a model "
            "of PEFT"
        )
    sizes = _sizes(tokens)
    units = [list(map(_form, unit)) for unit in _units(layer for layer in layers.values() if layer.is_linear)]
    units += [[form] for form in others if form is not None]
    kinds: dict[object, list[list[Form]]] = {}
    for unit in units:
        for form in unit:
            _check_dtype(form, dtype)
        if all(_is_served(form, dtype) for form in unit):
            kinds.setdefault(tuple(form.key for form in unit), []).append(unit)
    seconds = [0.0] * len(kinds)
    plan = [(i, alike[0], size) for i, alike in enumerate(kinds.values()) for size in sizes]
    for i, unit, size in shown(plan, "compiling", progress):
        begun = time.monotonic()
        _run(unit, size, dtype, training)
        if any(form.drops for form in unit) and training and unit[0].device.type == "cuda":
            with seeds_on_device():  # as a CUDA graph or torch.compile will call them
                _run(unit, size, dtype, training)
        seconds[i] += time.monotonic() - begun
    what = f"{'forward and backward' if training else 'forward'} with {', '.join(map(str, sizes))} tokens"
    lines = [_line(alike, what, took) for alike, took in zip(kinds.values(), seconds, strict=True)]
    if progress:
        done = f"compiled for {len(lines)} kinds of layers in {sum(seconds):.1f} s"
        note(done if lines else "warmup: no layer of this model runs on Triton kernels here, and nothing was compiled")
    return lines


def _line(alike: list[list[Form]], what: str, seconds: float) -> str:
    kind = "layer" if len(alike[0]) == 1 else "group"
    count = f"{len(alike)} {kind}{'' if len(alike) == 1 else 's'}"
    return f"{count} like ({alike[0][0].text}): {what}, {seconds:.1f} s"


def _units(layers: Iterable[GLoRALinear]) -> list[list[GLoRALinear]]:
    """The layers to run together: members of a fused group, other layers singly; not those merged or disabled."""
    units: dict[int, list[GLoRALinear]] = {}
    for layer in layers:
        members = [layer] if layer._siblings is None or not layer._siblings.fused else layer._siblings.members
        present = [member for member in members if member is not None]
        units.setdefault(id(present[0]), present)
    return [unit for unit in units.values() if not any(layer.merged or layer._disabled for layer in unit)]


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
    return list(dict.fromkeys(given)) if several else configs.classes(given[0])


def _check_dtype(form: Form, dtype: torch.dtype | None) -> None:
    if dtype not in (None, form.dtype, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dtype must be None, that of the weights ({form.dtype}), or torch.float16 or torch.bfloat16 for "
            f"autocast; got {dtype}"
        )


def _is_served(form: Form, dtype: torch.dtype | None) -> bool:
    device = form.device.type
    return device != "meta" and not routes.is_eager(routes.route(device, dtype or form.dtype, form.is_4bit))


def _others(model: nn.Module) -> Iterator[Form | None]:
    """The forms of other layers (PEFT's, 4-bit ones), without looking inside them for their bases."""
    form: Any = getattr(model, "warmup_form", None)
    if form is not None:
        yield form()
    elif isinstance(model, QuantizedLinear):
        yield _form(model)
    else:
        for child in model.children():
            yield from _others(child)


def _form(layer: GLoRALinear | QuantizedLinear) -> Form:
    tensors, config = layer.active_adapter() if isinstance(layer, GLoRALinear) else ({}, None)
    adapter = Operands() if config is None else Operands.of(config, tensors, True)
    return form_of(layer, layer.frozen(), adapter, layer.extra_repr())


def form_of(layer: nn.Module, base: Frozen, adapter: Operands, text: str) -> Form:
    """The form of a layer that is one call of our operators with this base and this adapter."""
    weight, (n, k) = base.weight, base.weight.shape
    layout: tuple[object, ...]
    if isinstance(weight, Tensor):
        dtype, layout = weight.dtype, weight.stride()
    else:
        state = weight.state
        dtype = base.compute_dtype or state.dtype
        layout = base.compute_dtype, state.dtype, state.quant_type, state.blocksize, state.nested is not None
    tensors = {"bias": base.bias, **adapter.tensors}.items()
    parts = [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors if t is not None]
    drops = adapter.dropout_p > 0
    # Everything that the compiled kernels and their launches depend on.
    key = (n, k, weight.device, dtype, *layout, *parts, adapter.variant, drops)
    return Form(layer, k, weight.device, dtype, not isinstance(weight, Tensor), drops, key, text)


def _run(unit: list[Form], tokens: int, dtype: torch.dtype | None, training: bool) -> None:
    """Run forward (and backward) without hooks, on detached parameters, so that no gradients are left."""
    device, base_dtype = unit[0].device, unit[0].dtype
    autocast: Any = contextlib.nullcontext()
    if dtype is not None and dtype != base_dtype:
        autocast = torch.autocast(device.type, dtype=dtype)
    x = torch.zeros(tokens, unit[0].in_features, device=device, dtype=base_dtype, requires_grad=training)
    bare = _Bare([form.layer for form in unit])
    was = [(module, module.training) for module in bare.modules()]
    own: dict[str, Tensor] = {
        name: parameter.detach().requires_grad_(training)
        for name, parameter in bare.named_parameters()
        if parameter.requires_grad
    }
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.set_grad_enabled(training), autocast:
        for module, _ in was:
            module.training = training
        try:
            ys = functional_call(bare, own, (x,))
        finally:
            for module, flag in was:
                module.training = flag
        if training:
            wanted = [x, *own.values()]
            torch.autograd.grad(ys, wanted, [torch.zeros_like(y) for y in ys], allow_unused=True)
    if on_gpu:
        torch.cuda.synchronize(device)


class _Bare(nn.Module):
    """Layers called with one input, by their forward, so that their hooks do not run."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer.forward(x) for layer in self.layers]
