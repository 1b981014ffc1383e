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
    """What `warmup` asks of a layer. One of another class than GLoRALinear gives it by its method `warmup_form`.

    layer: called with one x (M, in_features). key: equal where two layers are alike. text: the layer in a few words.
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
    """Run each different GLoRA layer of the model on zeros, so that its kernels are compiled before step one.

    Also the layers of an accelerated PEFT model, and of our methods of PEFT, with the adapters that are active; and
    linear layers in 4 bits (`quantize`) that have no adapter.

    Layers that are fused as siblings are run together.

    Layers are alike where sizes, dtypes, device, layout, supports, dropout and what requires a gradient are. Nothing of
    the model changes: no gradient is left, no hook runs, the generators of the CPU and the GPU and every `training`
    flag are as before. What stays is compiled code, and the workspaces that the layers will use.

    Launches are the same for all numbers of tokens of a class (`runtime.configs.representative`), and there are seven
    classes. An integer stands for all up to it: after 8192, no number of tokens compiles anything more. A list is taken
    as it is, for steps whose sizes are known.

    In training the input wants a gradient, as in all layers but the first of a model. Layers that are merged or
    disabled are left out, and so are those that no Triton kernel serves: on a CPU nothing is compiled (but in Triton's
    interpreter under `backend("triton")`, where the steps are run all the same), and nothing is done.

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        tokens: rows of the layers' input, batch times sequence: the most there will be, or a list of all there will be.
        dtype: of the activations. None: that of each layer's weight. Another than the weight's, float16 or bfloat16,
            stands for training under autocast.
        training: forward and backward in training mode; False: forward alone, in evaluation mode.
        progress: show how far it is, and at the end how long it took, on stderr.

    Returns:
        One line for each kind of layer: which layers, with how many tokens, and how long it took.

    Raises:
        TypeError: `model` is no module, or `tokens` no integers.
        ValueError: the model has no layer that runs on our operators or is sharded, tokens below 1, or a dtype that
            autocast does not offer.
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
    units = [list(map(_form, unit)) for unit in _units(layers.values())]
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
    if progress and lines:
        note(f"compiled for {len(lines)} kinds of layers in {sum(seconds):.1f} s")
    return lines


def _line(alike: list[list[Form]], what: str, seconds: float) -> str:
    kind = "layer" if len(alike[0]) == 1 else "group"
    count = f"{len(alike)} {kind}{'' if len(alike) == 1 else 's'}"
    return f"{count} like ({alike[0][0].text}): {what}, {seconds:.1f} s"


def _units(layers: Iterable[GLoRALinear]) -> list[list[GLoRALinear]]:
    """What one launch computes: the members of a group of siblings, any other layer by itself; what is not idle."""
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
    return device != "meta" and routes.route(device, dtype or form.dtype, form.is_4bit) != "eager"


def _others(model: nn.Module) -> Iterator[Form | None]:
    """What is no GLoRA layer; of one with a base as a module, the layer."""
    form: Any = getattr(model, "warmup_form", None)
    if form is not None:
        yield form()
    elif isinstance(model, QuantizedLinear):
        yield _form(model)
    else:
        for child in model.children():
            yield from _others(child)


def _form(layer: GLoRALinear | QuantizedLinear) -> Form:
    adapter = Operands.of(layer.config, layer.adapter(), True) if isinstance(layer, GLoRALinear) else Operands()
    return form_of(layer, layer.frozen(), adapter, layer.extra_repr())


def form_of(layer: nn.Module, base: Frozen, adapter: Operands, text: str) -> Form:
    """The form of a layer that is one call on our operators, with this base and this adapter."""
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
    # What the code of its kernels, and their launches, depend on.
    key = (n, k, weight.device, dtype, *layout, *parts, adapter.variant, drops)
    return Form(layer, k, weight.device, dtype, not isinstance(weight, Tensor), drops, key, text)


def _run(unit: list[Form], tokens: int, dtype: torch.dtype | None, training: bool) -> None:
    """One forward, and backward, without a trace: on parameters that share the layers' memory, and without hooks."""
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
    """Layers called with one input, without their hooks."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer.forward(x) for layer in self.layers]
