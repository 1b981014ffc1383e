"""Whole models: find the GLoRA layers in one, merge them, switch them off, count what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glora_kernels.nn.biases import added_biases, warn_of_biases
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.mergeable import UNSHARD
from glora_kernels.nn.merging import (
    SHIFTS,
    adds_bias,
    merge_together,
    named,
    split_for_merge,
    split_for_unmerge,
    unmerge_all,
    unmerge_together,
)
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.requantize import MergeReport, refusal, remerging, requantized
from glora_kernels.nn.ties import memory, overlaps, owned
from glora_kernels.nn.undo import all_or_none
from glora_kernels.runtime.progress import progress as shown

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""The names under which wrappers hold the module they wrap; they are no part of a module's path."""

TRAINED = "_glora_trained"
"""The attribute that marks a module trained whole: it travels with the module through copies and pickles."""


def wrapped(model: nn.Module) -> nn.Module | None:
    """What torch.compile, PyTorch's data parallelism or AveragedModel, Lightning's Fabric or DeepSpeed has wrapped."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
        return model.module
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return model._modules["module"]
    return next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all its wrappers, whose names are no part of a path (`wrapped`)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def clean(path: str) -> str:
    """A module path without the names that wrappers put into it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def named_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """The GLoRA layers of an unwrapped model by path; one used at several paths is there by its first."""
    return {clean(path): m for path, m in model.named_modules() if isinstance(m, GLoRALinear)}


def layers_of(model: nn.Module, caller: str) -> dict[str, GLoRALinear]:
    layers = named_layers(unwrap(model))
    if not layers:
        raise ValueError(f"{caller}: the model has no GLoRA layer; call inject(model, config) first")
    return layers


def merge(model: nn.Module, requantize: bool = False, *, progress: bool = False) -> MergeReport | None:
    """Merge every GLoRA layer of the model in place, or, where one fails, none.

    On a GPU in one launch (one for each weight dtype, adapter dtype and order of storage), W_eff computed in fp32 and
    rounded once, after a copy of the bases into pinned host memory. What the kernels do not take (float64, CPUs,
    `backend("eager")`, a product variant above rank 64) is merged layer by layer; so are 4-bit layers, which need
    `requantize=True`:

        print(gk.merge(model, requantize=True))

    Args:
        model: with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        requantize: round the merged weights of 4-bit layers to 4 bits again. Most of a small adapter is lost in that;
            `GLoRALinear.to_linear(dtype)` gives dense merged layers instead.
        progress: show on stderr how far along it is with the 4-bit layers.

    Returns:
        What rounding to 4 bits has done, to each layer and overall; None where no layer is in 4 bits.

    Raises:
        ValueError: the model has no GLoRA layer or is sharded, or a base weight or bias that would change belongs to
            another module too (an embedding tied to it, say), or a merged weight or bias holds NaN or inf where the
            base does not (an overflow of fp16, say). The message names the layer.
        RuntimeError: a layer is merged already, or disabled, or has a 4-bit base and `requantize` is False.

    Warns:
        UserWarning: layers without a bias get one (C, E) that the architecture drops when it is loaded again; the
            message names the flag of its configuration that keeps it, where there is one.
    """
    layers = layers_of(model, "merge")
    refuse_sharded(unwrap(model), "merge", UNSHARD)
    if path := next((path for path, layer in layers.items() if layer.merged), None):
        raise RuntimeError(f"merge: {path!r} is merged already; call unmerge(model) first")
    for path, layer in layers.items():
        layer.check_intact(f"merge: {path!r}", ("weight", "bias"))
    refuse_four_bit("merge", layers, requantize)
    refuse_tied("merge", unwrap(model), layers)
    four_bit = {path: layer for path, layer in layers.items() if layer.quant_state is not None}
    together, single = split_for_merge({path: layer for path, layer in layers.items() if path not in four_bit})
    biases = added_biases(unwrap(model), [path for path, layer in layers.items() if adds_bias(layer)])
    reports: dict[str, MergeReport] = {}
    with all_or_none() as undo:
        undo.callback(unmerge_all, layers.values())
        for path, layer in shown(list(four_bit.items()), "requantizing", progress):
            with named(path):
                report = layer.merge(requantize=True)
            if report is not None:
                reports[path] = report
        for path, layer in single.items():
            with named(path):
                layer.merge()
        merge_together(together)
        warn_of_biases("merge", biases, 2)
    return MergeReport.of_model(reports) if reports else None


def refuse_four_bit(caller: str, layers: Mapping[str, GLoRALinear], requantize: bool) -> None:
    """An error where layers are in 4 bits and merged weights may not be rounded to them."""
    four_bit = {path: layer for path, layer in layers.items() if layer.quant_state is not None}
    if not four_bit or requantize:
        return
    path, layer = next(iter(four_bit.items()))
    reason = refusal(layer, requantized(layer)[1])
    raise RuntimeError(f"{caller}: {len(four_bit)} of {len(layers)} layers are in 4 bits, the first {path!r}: {reason}")


def unmerge(model: nn.Module) -> None:
    """Restore the base of every GLoRA layer of the model, bit for bit; or, where one fails, of none.

    On a GPU in one launch that reads the bases from pinned host memory; layer by layer where none could be pinned (a
    warning of `merge`), or where weights have changed their dtype or device meanwhile.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: a layer is not merged.
    """
    layers = layers_of(model, "unmerge")
    if path := next((path for path, layer in layers.items() if not layer.merged), None):
        raise RuntimeError(f"unmerge: {path!r} is not merged")
    together, single = split_for_unmerge(layers)
    with all_or_none() as undo:
        _unmerged(single.values(), undo)
        unmerge_together(together)


def _unmerged(layers: Iterable[GLoRALinear], undo: contextlib.ExitStack) -> None:
    """Unmerge layers, which `undo` merges again."""
    for layer in layers:
        undo.callback(remerging(layer))
    for layer in layers:
        layer.unmerge()


def refuse_tied(caller: str, model: nn.Module, layers: Mapping[str, GLoRALinear]) -> None:
    """An error where merging a layer would change another module's parameter."""
    owners: dict[object, list[tuple[str, Tensor]]] = {}
    for path, module in model.named_modules():
        for name, tensor in owned(module):
            owners.setdefault(memory(tensor), []).append((clean(f"{path}.{name}".lstrip(".")), tensor))
    for path, layer in layers.items():
        changed: dict[str, Tensor | None] = {
            "weight": layer.weight,
            "absmax": None if layer.quant_state is None else layer.quant_state.absmax,
            "bias": None if SHIFTS.isdisjoint(layer.adapter()) else layer.bias,
        }
        for name, mine in changed.items():
            if mine is None or len(near := owners[memory(mine)]) < 2:
                continue
            if len(names := [owner for owner, other in near if overlaps(mine, other)]) > 1:
                raise ValueError(
                    f"{caller}: the {name} of {path!r} is shared by {names}, and merging would change all of "
                    "them; untie it, or replace the layer by to_linear()"
                )


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every GLoRA layer behaves as its base; merged layers are unmerged meanwhile and merged again.

    A 4-bit layer gets the very codes back that it had; it is only rounded anew where its adapter was changed inside (a
    write through `.data`, which leaves no trace, is not noticed).
    Modules trained whole (`inject(..., train=...)`) stay as they are. Nests.

    Raises:
        ValueError: the model has no GLoRA layer.
    """
    layers = layers_of(model, "disabled").values()
    merged = [layer for layer in layers if layer.merged]
    again = [remerging(layer) for layer in merged]
    here = object()

    def leave() -> None:
        for layer in layers:
            layer._disabled = tuple(context for context in layer._disabled if context is not here)
        with all_or_none() as undo:
            undo.callback(unmerge_all, merged)
            for merge_again in again:
                merge_again()

    try:
        try:
            unmerge_all(merged)
            for layer in layers:
                layer._disabled = (*layer._disabled, here)
            yield
        finally:
            leave()
    except BaseException:
        leave()  # the first may have been interrupted
        raise


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers of the model require a gradient; a shared parameter counts once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def all_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module) of an unwrapped model, the same module once a path."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield clean(path), module


def listed(kind: str, names: list[str], most: int = 12) -> str:
    """A sentence for error messages: which names there are to choose from."""
    if not names:
        return f"The model has no {kind} to choose from"
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return f"Available {kind} names: {', '.join(map(repr, names[:most]))}{more}"
