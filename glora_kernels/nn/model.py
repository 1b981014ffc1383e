"""Whole models: find the GLoRA layers in one, merge them, switch them off, count what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from glora_kernels.launch.progress import progress as shown
from glora_kernels.nn.linear import UNSHARD, GLoRALinear
from glora_kernels.nn.merging import merge_together, split_for_merge, split_for_unmerge, unmerge_together
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.requantize import MergeReport, refusal, remerging, requantized

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""The names under which wrappers hold the module they wrap; they are no part of a module's path."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and DataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        else:
            return model
        assert inner is not None
        model = inner


def clean(path: str) -> str:
    """A module path without the names that wrappers put into it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def named_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """The GLoRA layers of an unwrapped model by path; one used at several paths is there by its first."""
    return {clean(path): m for path, m in model.named_modules() if isinstance(m, GLoRALinear)}


def _layers(model: nn.Module, caller: str) -> dict[str, GLoRALinear]:
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
            another module too (an embedding tied to it, say), or a merged weight to round to 4 bits holds NaN or inf.
        RuntimeError: a layer is merged already, or disabled, or has a 4-bit base and `requantize` is False.
    """
    layers = _layers(model, "merge")
    refuse_sharded(unwrap(model), "merge", UNSHARD)
    if path := next((path for path, layer in layers.items() if layer.merged), None):
        raise RuntimeError(f"merge: {path!r} is merged already; call unmerge(model) first")
    four_bit = {path: layer for path, layer in layers.items() if layer.quant_state is not None}
    if four_bit and not requantize:
        path, layer = next(iter(four_bit.items()))
        reason = refusal(layer, requantized(layer)[1])
        raise RuntimeError(
            f"merge: {len(four_bit)} of {len(layers)} layers are in 4 bits, the first {path!r}: {reason}"
        )
    _refuse_tied(unwrap(model), layers)
    together, single = split_for_merge({path: layer for path, layer in layers.items() if path not in four_bit})
    reports: dict[str, MergeReport] = {}
    with contextlib.ExitStack() as undo:
        for path, layer in shown(list(four_bit.items()), "requantizing", progress):
            reports[path] = _merge_4bit(path, layer)
            undo.callback(layer.unmerge)
        for layer in single.values():
            layer.merge()
            undo.callback(layer.unmerge)
        merge_together(together)
        undo.pop_all()
    return MergeReport.of_model(reports) if reports else None


def _merge_4bit(path: str, layer: GLoRALinear) -> MergeReport:
    try:
        report = layer.merge(requantize=True)
    except ValueError as error:
        raise ValueError(f"merge: {path!r}: {error}") from error
    assert report is not None
    return report


def unmerge(model: nn.Module) -> None:
    """Restore the base of every GLoRA layer of the model, bit for bit.

    On a GPU in one launch that reads the bases from pinned host memory; layer by layer where none could be pinned (a
    warning of `merge`), or where weights have changed their dtype or device meanwhile.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: a layer is not merged.
    """
    layers = _layers(model, "unmerge")
    if path := next((path for path, layer in layers.items() if not layer.merged), None):
        raise RuntimeError(f"unmerge: {path!r} is not merged")
    together, single = split_for_unmerge(layers)
    again = {layer: remerging(layer) for layer in single.values()}
    _all_or_none(single, GLoRALinear.unmerge, lambda layer: again[layer]())
    try:
        unmerge_together(together)
    except BaseException:
        for layer in single.values():
            again[layer]()
        raise


def _all_or_none(
    layers: dict[str, GLoRALinear], act: Callable[[GLoRALinear], object], undo: Callable[[GLoRALinear], object]
) -> None:
    done: list[GLoRALinear] = []
    try:
        for layer in layers.values():
            act(layer)
            done.append(layer)
    except BaseException:
        for layer in done:
            undo(layer)
        raise


def _refuse_tied(model: nn.Module, layers: dict[str, GLoRALinear]) -> None:
    """An error where merging a layer would change another module's parameter."""
    owners: dict[object, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(clean(f"{path}.{name}".lstrip(".")))
    shifts = {"C", "C_up", "D", "E"}
    for path, layer in layers.items():
        changed = {"weight": layer.weight, "bias": layer.bias if not shifts.isdisjoint(layer.adapter()) else None}
        for name, parameter in changed.items():
            if parameter is not None and len(names := owners[_memory(parameter)]) > 1:
                raise ValueError(
                    f"merge: the {name} of {path!r} is shared by {names}, and merging would change all of "
                    "them; untie it, or replace the layer by to_linear()"
                )


def _memory(tensor: Tensor) -> object:
    """What two tied parameters have in common, even where they are two Parameter objects."""
    return (tensor.device, tensor.data_ptr()) if tensor.data_ptr() else id(tensor)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every GLoRA layer behaves as its base; merged layers are unmerged meanwhile and merged again.

    A 4-bit layer gets the very codes back that it had; it is only rounded anew where its adapter was changed inside (a
    write through `.data`, which leaves no trace, is not noticed).
    Modules trained whole (`inject(..., train=...)`) stay as they are. Nests.

    Raises:
        ValueError: the model has no GLoRA layer.
    """
    layers = _layers(model, "disabled")
    merged = {path: layer for path, layer in layers.items() if layer.merged}
    again = {layer: remerging(layer) for layer in merged.values()}
    _all_or_none(merged, GLoRALinear.unmerge, lambda layer: again[layer]())
    for layer in layers.values():
        layer._disabled += 1
    try:
        yield
    finally:
        for layer in layers.values():
            layer._disabled -= 1
        _all_or_none(merged, lambda layer: again[layer](), GLoRALinear.unmerge)


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
