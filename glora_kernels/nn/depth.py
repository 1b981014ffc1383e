"""Contexts that batch work over all layers: β before a forward, gradients of shared factors at the end of backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from glora_kernels.depth import op as depth
from glora_kernels.depth.deferred import Deferred, DeferredLinear, ticket
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.merging.models import table_entry
from glora_kernels.nn.model import layers_of


@contextlib.contextmanager
def shift_once(model: nn.Module) -> Iterator[None]:
    """Compute β = b + b∘D + E + W·C of every layer once, in one launch; inside, the layers use it as their bias.

        for batch in batches:
            with gk.shift_once(model):
                loss = model(batch)
            loss.backward()
            optimizer.step()

    Without it each layer computes β at each forward. Enter the context once a step. The parameters get their gradients
    as usual, in one launch (two where a C is lora). Several forwards and backwards may follow one another inside; each
    backward has its own launch.

    If the weight, the bias, C, D or E of a layer changes inside (an optimizer's step, load_state_dict,
    `requires_grad_`), this layer computes β at each forward from then on, as it does under torch.compile. Writes
    through `.data` are not noticed: leave the context first.

    With activation checkpointing of either kind call backward inside the context, because it runs the forward again.
    Each segment of a reentrant checkpoint has its own launch in backward.

    Layers without C, D and E, layers of experts, merged or disabled ones, and those with an active adapter beside the
    first are left out, and β does not serve `rows`; copies and pickles made inside do not carry β. The context may be
    nested. Where the kernels do not apply (float64, CPUs, `backend("eager")`), β is computed layer by layer.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: a CUDA graph is being captured; or, in backward, a tensor that β depends on was overwritten.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(C="vector", E="vector"), ["0"])
        >>> with gk.shift_once(model):
        ...     model(torch.randn(2, 16)).sum().backward()
    """
    layers = [layer for layer in layers_of(model, "shift_once").values() if _is_shifted(layer)]
    before = [layer._beta for layer in layers]
    betas = depth.shifts([table_entry(layer) for layer in layers])
    kept = [KeptShift(layer, beta) for layer, beta in zip(layers, betas, strict=True)]

    def stepped(*_: object) -> None:
        for shift in kept:
            shift.stale = True

    after_steps = register_optimizer_step_post_hook(stepped)
    try:
        for layer, shift in zip(layers, kept, strict=True):
            layer._beta = shift
        yield
    finally:
        after_steps.remove()
        for layer, beta_before in zip(layers, before, strict=True):
            layer._beta = beta_before


@contextlib.contextmanager
def deferred_shared_grads(model: nn.Module) -> Iterator[Deferred]:
    """Compute the gradient of every factor that layers share at the end of backward, in one launch for all of them.

        with gk.deferred_shared_grads(model) as deferred:
            loss = model(batch)
        loss.backward()
        optimizer.step()

    dB_down = Σ_l s·(dy_l·B_up,l)ᵀ·x̃_l (dB_up = s·Σ_l dy_lᵀ·(x̃_l·B_down,lᵀ)) is then one product in fp32 over all
    layers that hold the factor, summed in their order and rounded once. Without the context autograd accumulates the
    layers' gradients one by one, in the dtype of the parameter, and holds no tensors until the end of backward.

    Run the forward inside. Backward may run inside or later, once or several times; optimizers, clipping, hooks and
    `torch.autograd.grad` see the same gradients as without the context, in DistributedDataParallel too. Each backward
    has its own launch, and so has each segment of a reentrant checkpoint. Where activation checkpointing runs a forward
    again after the context was left, autograd accumulates its gradients.

    The price is memory that backward would otherwise free layer by layer: M·(K + R)·itemsize bytes a layer where
    B_down is shared (x_l and S_l = dy_l·B_up,l), M·(N + R)·itemsize where B_up is (dy_l and h_l); an x that several
    layers read counts once. `deferred.bytes` is the sum over all backwards so far.

    Autograd also accumulates where torch.compile traces a layer, under a dispatch mode or a transform of torch.func,
    in layers fused with siblings, in layers of experts, for adapters beside the first and inside `rows`, and in a
    backward with create_graph=True.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: the context is open already.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        >>> model = gk.inject(model, gk.ShareLoRAConfig(rank=4), target_modules=["0", "1"])
        >>> with gk.deferred_shared_grads(model) as deferred:
        ...     loss = model(torch.randn(2, 16)).sum()
        >>> loss.backward()
    """
    layers = [layer for layer in layers_of(model, "deferred_shared_grads").values() if layer.is_linear]
    if any(layer._deferred is not None for layer in layers):
        raise RuntimeError("deferred_shared_grads was entered inside deferred_shared_grads of the same layers")
    shared = _shared(layers)
    deferred = Deferred()
    by_device: dict[torch.device, dict[nn.Parameter, None]] = {}
    for names in shared.values():
        for parameter in names.values():
            by_device.setdefault(parameter.device, {})[parameter] = None
    tickets = {device: ticket(deferred, tuple(parameters)) for device, parameters in by_device.items()}
    try:
        for place, (layer, names) in enumerate(shared.items()):
            device = next(iter(names.values())).device
            layer._deferred = DeferredLinear(deferred, tickets[device], place, names)
        yield deferred
    finally:
        deferred.drop()
        for layer in shared:
            layer._deferred = None


class KeptShift:
    """β = b + b∘D + E + W·C of a layer, and the tensors it was computed from.

    Overwritten tensors are noticed by PyTorch's version counter, which misses writes through `.data` and does not exist
    for inference tensors. An optimizer may bypass it too, so every optimizer step sets `stale`.
    """

    def __init__(self, layer: GLoRALinear, beta: Tensor) -> None:
        self.beta, self.stale = beta, False
        # The detached tensor keeps the memory alive, so that no new parameter can be allocated at the same address.
        self._terms = [(tensor, tensor.detach(), *_state(tensor)) for tensor in _terms(layer)]

    def current(self, layer: GLoRALinear) -> Tensor | None:
        """β, or None where the layer's parameters have changed since, or need a gradient that β does not carry."""
        if self.stale or (self.beta.is_inference() and not torch.is_inference_mode_enabled()):
            return None
        terms = _terms(layer)
        if torch.is_grad_enabled() and not self.beta.requires_grad and any(tensor.requires_grad for tensor in terms):
            return None
        is_same = len(terms) == len(self._terms) and all(
            tensor is before
            and torch._C._is_alias_of(tensor, memory)  # type: ignore[attr-defined]
            and _state(tensor) == tuple(state)
            for tensor, (before, memory, *state) in zip(terms, self._terms, strict=True)
        )
        return self.beta if is_same else None


def _terms(layer: GLoRALinear) -> list[Tensor]:
    """The tensors that a layer's β depends on."""
    tensors = (getattr(layer, name) for name in ("weight", "bias", "C", "C_up", "C_down", "D", "E"))
    return [tensor for tensor in tensors if tensor is not None]


def _state(tensor: Tensor) -> tuple[int, bool]:
    return 0 if tensor.is_inference() else tensor._version, tensor.requires_grad


def _is_shifted(layer: GLoRALinear) -> bool:
    return layer.has_shift and layer.is_linear and not layer.merged and not layer._disabled and layer._active is None


def _shared(layers: list[GLoRALinear]) -> dict[GLoRALinear, dict[str, nn.Parameter]]:
    """The layers whose trained B_up or B_down another layer has too, with these factors by argument (b_up, b_down)."""
    owners: dict[nn.Parameter, list[tuple[GLoRALinear, str]]] = {}
    for layer in layers:
        for name, parameter in layer.adapter().items():
            if name in ("B_down", "B_up") and parameter.requires_grad:
                owners.setdefault(parameter, []).append((layer, name.lower()))
    found: dict[GLoRALinear, dict[str, nn.Parameter]] = {layer: {} for layer in layers}
    for parameter, holders in owners.items():
        for layer, argument in holders if len({layer for layer, _ in holders}) > 1 else ():
            found[layer][argument] = parameter
    return {layer: factors for layer, factors in found.items() if factors}
