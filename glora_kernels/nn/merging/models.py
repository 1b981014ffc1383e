"""Merging and unmerging all layers of a model, in few launches where the kernels allow it; making it a plain model."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from glora_kernels.depth import op as depth
from glora_kernels.depth.table import Layer
from glora_kernels.nn.adapted import with_scale_A
from glora_kernels.nn.base import FROZEN, HOOKS, M
from glora_kernels.nn.biases import added_biases, keep_biases, warn_of_biases
from glora_kernels.nn.experts import ExpertLinear, give_back, keep_names
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.merging.layer import UNSHARD
from glora_kernels.nn.merging.rounding import MergeReport, refusal
from glora_kernels.nn.merging.values import Kept, ToMerge, check_finite
from glora_kernels.nn.model import TRAINED, all_paths, clean, is_in_ddp, join, layers_of, unwrap
from glora_kernels.nn.projections import unguard
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.share import forget_tied
from glora_kernels.nn.ties import memory, overlaps, owned
from glora_kernels.nn.undo import all_or_none
from glora_kernels.nn.wide import narrow, narrowed
from glora_kernels.quant.bnb import free_codes
from glora_kernels.runtime.planning import is_planning
from glora_kernels.runtime.progress import progress as shown


def merge(model: nn.Module, requantize: bool = False, *, progress: bool = False) -> MergeReport | None:
    """Merge every GLoRA layer of the model in place; if one fails, none is merged.

    On a GPU one launch (for each weight dtype, adapter dtype and order of storage) computes every W_eff in fp32 and
    rounds once, after the bases were copied into pinned host memory. Where the kernels do not apply (float64, CPUs,
    `backend("eager")`, a product variant above rank 64) layers are merged one by one; so are convolutions, layers of
    experts, and 4-bit layers, which need `requantize=True`:

        print(gk.merge(model, requantize=True))

    Args:
        model: with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        requantize: round the merged weights of 4-bit layers to 4 bits again. This loses most of a small adapter;
            `GLoRALinear.to_linear(dtype)` gives dense merged layers instead.
        progress: show the progress over the 4-bit layers on stderr.

    Returns:
        The report on rounding to 4 bits, for each layer and overall; None where no layer is in 4 bits.

    Raises:
        ValueError: the model has no GLoRA layer or is sharded; another module (a tied embedding, say) has the weight or
            bias that would change; or merged values hold NaN or inf where the base does not (an overflow of fp16,
            say). The message names the layer.
        RuntimeError: a layer is merged already, or disabled, or has a 4-bit base and `requantize` is False.

    Warns:
        UserWarning: layers without a bias get one (from C, E) that is dropped when the model is loaded again; the
            message names the configuration flag that keeps it, if there is one.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"]).eval()
        >>> gk.merge(model)  # a plain product from here on
        >>> gk.unmerge(model)
    """
    layers = layers_of(model, "merge")
    refuse_sharded(unwrap(model), "merge", UNSHARD)
    if path := next((path for path, layer in layers.items() if layer.merged), None):
        raise RuntimeError(f"merge: {path!r} is merged already; call unmerge(model) first")
    for path, layer in layers.items():
        layer.check_intact(f"merge: {path!r}", ("weight", "bias"))
    _refuse_four_bit("merge", layers, requantize)
    refuse_tied("merge", unwrap(model), layers)
    four_bit = {path: layer for path, layer in layers.items() if layer.quant_state is not None}
    dense = {path: layer for path, layer in layers.items() if path not in four_bit}
    single = {
        path: layer for path, layer in dense.items() if not layer.is_linear or depth.served(table_entry(layer)) is None
    }
    biases = added_biases(unwrap(model), [path for path, layer in layers.items() if _adds_bias(layer)])
    reports: dict[str, MergeReport] = {}
    with all_or_none() as undo:
        undo.callback(_unmerge_all, layers.values())
        for path, layer in shown(list(four_bit.items()), "requantizing", progress):
            with _named(path):
                report = layer.merge(requantize=True)
            if report is not None:
                reports[path] = report
        for path, layer in single.items():
            with _named(path):
                layer.merge()
        _merge_together({path: layer for path, layer in dense.items() if path not in single})
        warn_of_biases("merge", biases, 2)
    return MergeReport.of_model(reports) if reports else None


def unmerge(model: nn.Module) -> None:
    """Restore the base of every GLoRA layer of the model, bit for bit; if one fails, none is restored.

    On a GPU one launch reads the bases from pinned host memory. Layers are restored one by one where memory could not
    be pinned (`merge` warns of that), or where weights have changed their dtype or device meanwhile.

    Raises:
        ValueError: the model has no GLoRA layer.
        RuntimeError: a layer is not merged.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> weight = model[0].weight.clone()
        >>> gk.merge(model)
        >>> gk.unmerge(model)
        >>> torch.equal(model[0].weight, weight)
        True
    """
    layers = layers_of(model, "unmerge")
    if path := next((path for path, layer in layers.items() if not layer.merged), None):
        raise RuntimeError(f"unmerge: {path!r} is not merged")
    single = {
        path: layer
        for path, layer in layers.items()
        if not layer.is_linear or layer.quant_state is not None or depth.restorable(_copies(layer)) is None
    }
    with all_or_none() as undo:
        for layer in single.values():
            undo.callback(layer.remerging())
        for layer in single.values():
            layer.unmerge()
        _unmerge_together([layer for path, layer in layers.items() if path not in single])


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every GLoRA layer behaves as its base; merged layers are unmerged on entry and merged again on exit.

    A 4-bit layer gets its codes back bit for bit, and is rounded again only if its adapter was changed inside (writes
    through `.data` are not noticed). Modules trained whole (`inject(..., train=...)`) stay as they are. The context may
    be nested.

    Raises:
        ValueError: the model has no GLoRA layer.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> with gk.disabled(model):
        ...     reference = model(torch.randn(2, 16))  # of the base, as for DPO
    """
    layers = layers_of(model, "disabled").values()
    merged = [layer for layer in layers if layer.merged]
    again = [layer.remerging() for layer in merged]
    here = object()

    def leave() -> None:
        for layer in layers:
            layer._disabled = tuple(context for context in layer._disabled if context is not here)
        with all_or_none() as undo:
            undo.callback(_unmerge_all, merged)
            for merge_again in again:
                merge_again()

    try:
        try:
            _unmerge_all(merged)
            for layer in layers:
                layer._disabled = (*layer._disabled, here)
            yield
        finally:
            leave()
    except BaseException:
        leave()  # the first may have been interrupted
        raise


@overload
def merge_and_unload(model: GLoRALinear, requantize: bool = False, *, progress: bool = False) -> nn.Module: ...
@overload
def merge_and_unload(model: M, requantize: bool = False, *, progress: bool = False) -> M: ...
def merge_and_unload(model: nn.Module, requantize: bool = False, *, progress: bool = False) -> nn.Module:
    """Merge every GLoRA layer and replace it by the plain module that it was made from: a model to deploy.

    The result has `nn.Linear`, transformers' `Conv1D`, `QuantizedLinear` and bitsandbytes' `Linear4bit` modules as
    before `inject`, of the same classes, on the same Parameters. Parameters that `inject` froze require a gradient
    again, and modules trained in fp32 inside a 16-bit model are rounded to 16 bits. Save, quantize, export or trace the
    result as any other model.

        model = gk.merge_and_unload(model)
        model.save_pretrained("merged")

    It works layer by layer, so that only one layer's base is held twice. All checks come before the first change. If it
    is interrupted, each layer is merged or as before; call it again to go on.

    Where a layer without a bias gets one (from C, E), a transformers model drops it when it is loaded, unless a flag of
    its configuration asks for it. This flag is looked for and set, and the other layers it affects get a bias of zeros.
    A warning says where there is no such flag. The weights of experts become parameters of their module again, which
    has no place for a bias that it did not have: such layers are refused.

    Args:
        model: with GLoRA layers, merged or not; changed in place. Also inside torch.compile.
        requantize: as in `merge`: round the merged weights of 4-bit layers to 4 bits again; a warning has the report.
            `GLoRALinear.to_linear(dtype)` gives dense layers instead.
        progress: show the progress on stderr.

    Returns:
        The model; where it is itself a GLoRA layer, the plain one.

    Raises:
        ValueError: the model has no GLoRA layer, is sharded or inside DistributedDataParallel, has tied weights that
            would change, merged or rounded values that hold NaN or inf, or a layer whose forward was replaced; or C or
            E would give experts a bias that their module has no place for, or a layer of experts has hooks.
        RuntimeError: a layer is disabled, or has a 4-bit base and `requantize` is False.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"]).eval()
        >>> gk.merge_and_unload(model)
        Sequential(
          (0): Linear(in_features=16, out_features=4, bias=True)
        )
    """
    layers, root = layers_of(model, "merge_and_unload"), unwrap(model)
    _check_replaceable("merge_and_unload", model, root, layers)
    for path, layer in layers.items():
        if layer.experts and layer.quant_state is None and _adds_bias(layer):
            raise ValueError(
                f"merge_and_unload: C and E of {path!r} would become a bias, which these experts do not have; train "
                "them with C='none' and E='none', or keep the layers and merge(model)"
            )
    unmerged = {path: layer for path, layer in layers.items() if not layer.merged}
    _refuse_four_bit("merge_and_unload", unmerged, requantize)
    refuse_tied("merge_and_unload", root, unmerged)
    for path, layer in unmerged.items():
        layer.check_mergeable()
        with _named(path):
            layer.merged_values()
    narrow_values = narrowed(root)
    biases = added_biases(root, (path for path, layer in layers.items() if _adds_bias(layer)))
    reports: dict[str, MergeReport] = {}
    plain: nn.Module = root
    for path, layer in shown(list(layers.items()), "merging", progress):
        if path in unmerged and (report := layer.merge(requantize)) is not None:
            reports[path] = report
        plain = _replaced(root, layer)
    _thaw(root)
    narrow(root, narrow_values)
    keep_biases(dict(all_paths(root)), biases)
    if biases.lost:
        warn_of_biases("merge_and_unload", biases, 2)
    if reports:
        warnings.warn(f"merged weights were rounded to 4 bits:\n{MergeReport.of_model(reports)}", stacklevel=2)
    return plain if isinstance(root, GLoRALinear) else model


@overload
def unload(model: GLoRALinear) -> nn.Module: ...
@overload
def unload(model: M) -> M: ...
def unload(model: nn.Module) -> nn.Module:
    """Replace every GLoRA layer by the plain module that it was made from: the model as before `inject`.

    The adapters are lost: save them first. Merged layers are unmerged. All else is as in `merge_and_unload`.

    Raises:
        ValueError: as in `merge_and_unload`.
        RuntimeError: inside `disabled`, `rows` or another context.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> gk.unload(model)  # the adapter is gone
        Sequential(
          (0): Linear(in_features=16, out_features=4, bias=True)
        )
    """
    layers, root = layers_of(model, "unload"), unwrap(model)
    _check_replaceable("unload", model, root, layers)
    for layer in layers.values():
        if layer._disabled or layer._rows is not None:
            raise RuntimeError("unload() was called inside a context of the model's layers; leave that first")
    narrow_values = narrowed(root)
    plain: nn.Module = root
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
        plain = _replaced(root, layer)
    _thaw(root)
    narrow(root, narrow_values)
    return plain if isinstance(root, GLoRALinear) else model


def _adds_bias(layer: GLoRALinear) -> bool:
    """Whether merging gives the layer a bias that its base does not have."""
    return layer.base_bias is None and layer.has_shift


def table_entry(layer: GLoRALinear) -> Layer:
    """A layer in the form that the operators over all layers (`depth`) take; its parameters stay part of the graph."""
    adapter, config = layer.active_adapter()
    adapter = with_scale_A(adapter, config.scale_A)
    return Layer(layer.base_weight(), layer.bias, adapter, config.scale, config.variant == "matmul")


def _refuse_four_bit(caller: str, layers: Mapping[str, GLoRALinear], requantize: bool) -> None:
    """Raise a RuntimeError where layers are in 4 bits and `requantize` is False."""
    four_bit = {path: layer for path, layer in layers.items() if layer.quant_state is not None}
    if not four_bit or requantize:
        return
    path, layer = next(iter(four_bit.items()))
    _, report = layer.merged_values()
    assert layer.quant_state is not None
    assert report is not None
    reason = refusal(layer.quant_state, report)
    raise RuntimeError(f"{caller}: {len(four_bit)} of {len(layers)} layers are in 4 bits, the first {path!r}: {reason}")


def refuse_tied(caller: str, model: nn.Module, layers: Mapping[str, GLoRALinear]) -> None:
    """Raise a ValueError where merging a layer would change another module's parameter."""
    owners: dict[object, list[tuple[str, Tensor]]] = {}
    for path, module in model.named_modules():
        for name, tensor in owned(module):
            owners.setdefault(memory(tensor), []).append((join(clean(path), name), tensor))
    for path, layer in layers.items():
        for name, mine in layer.written().items():
            if (name == "bias" and not layer.has_shift) or len(near := owners[memory(mine)]) < 2:
                continue
            if len(names := [owner for owner, other in near if overlaps(mine, other)]) > 1:
                raise ValueError(
                    f"{caller}: the {name} of {path!r} is shared by {names}, and merging would change all of "
                    "them; untie it, or replace the layer by to_linear()"
                )


@torch.no_grad()
def _merge_together(layers: Mapping[str, GLoRALinear]) -> None:
    """Merge all layers, with one launch for each device, dtype and order of storage; if one fails, none is merged.

    First the bases are copied to the host, from a GPU into pinned memory (which PyTorch caches for the next merge),
    with one wait for all copies of a device.
    """
    groups: dict[Hashable, list[str]] = {}
    tables = {path: table_entry(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.check_mergeable()
        if tables[path].adapter:
            groups.setdefault(depth.served(tables[path]), []).append(path)
    betas = {path: _beta_target(layer) for path, layer in layers.items()}
    bases = {
        path: Kept(depth.host_copy(layer.weight), None if layer.bias is None else depth.host_copy(layer.bias))
        for path, layer in layers.items()
    }
    for device in {layer.weight.device for layer in layers.values() if layer.weight.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    with all_or_none() as undo:
        undo.callback(_unmerge_all, layers.values())
        for path, layer in layers.items():
            layer.keep_base(bases[path])
        for paths in groups.values():
            depth.merge([tables[path] for path in paths], [betas[path] for path in paths])
        for path, layer in layers.items():
            if layer.bias is None and (beta := betas[path]) is not None:
                layer.bias = nn.Parameter(beta, requires_grad=False)
        if not is_planning():
            _check_finite(layers, bases)


def _unmerge_all(layers: Iterable[GLoRALinear]) -> None:
    """Put back the base of every layer that is merged."""
    for layer in layers:
        if layer.merged:
            layer.unmerge()


def _check_finite(layers: Mapping[str, GLoRALinear], bases: Mapping[str, Kept]) -> None:
    """Check the merged values in one pass; a base is read only where its merged values hold NaN or inf."""
    merged = [(path, t) for path, layer in layers.items() for t in (layer.weight, layer.bias) if t is not None]
    if not merged:
        return
    norms = torch._foreach_norm([tensor for _, tensor in merged], math.inf)
    broken = {path for (path, _), norm in zip(merged, norms, strict=True) if not math.isfinite(norm)}
    for path in broken:
        layer = layers[path]
        with _named(path):
            check_finite(ToMerge(layer, bases[path], ()), Kept(layer.weight, layer.bias))


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Add the path of the layer to a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"merge: {path!r}: {error}") from error


@torch.no_grad()
def _unmerge_together(layers: Sequence[GLoRALinear]) -> None:
    """Unmerge all layers, with one launch for each device and size of elements; if one fails, none is unmerged."""
    groups: dict[Hashable, list[GLoRALinear]] = {}
    for layer in layers:
        groups.setdefault(depth.restorable(_copies(layer)), []).append(layer)
    with all_or_none() as undo:
        undo.callback(_merge_again, layers)
        for group in groups.values():
            depth.restore([_copies(layer) for layer in group])
            for layer in group:
                layer.forget_base()


def _merge_again(layers: Sequence[GLoRALinear]) -> None:
    _unmerge_all(layers)  # an interrupted launch may have restored some of them
    _merge_together({str(i): layer for i, layer in enumerate(layers)})


def _copies(layer: GLoRALinear) -> depth.Copy:
    """(weight, its base values, bias, its base values); None for a bias that merging has added."""
    assert layer._base is not None
    weight, bias, _ = layer._base
    target = None if bias is None or layer.bias is None else layer.bias.detach()
    return layer.weight.detach(), weight, target, None if target is None else bias


def _beta_target(layer: GLoRALinear) -> Tensor | None:
    """The tensor to write the merged bias to: the bias itself, or new memory; None where the bias does not change."""
    if not layer.has_shift:
        return None
    if layer.bias is not None:
        return layer.bias.detach()
    return layer.weight.new_empty(layer.out_features)


def _check_replaceable(caller: str, model: nn.Module, root: nn.Module, layers: dict[str, GLoRALinear]) -> None:
    refuse_sharded(root, caller, UNSHARD)
    if is_in_ddp(model):
        raise ValueError(f"{caller}: the model is wrapped in DistributedDataParallel; pass model.module")
    if model is not root and isinstance(root, GLoRALinear):
        raise ValueError(f"{caller}: a single wrapped layer cannot be replaced; pass the layer itself")
    for path, layer in layers.items():
        if "forward" in vars(layer):
            raise ValueError(
                f"{caller}: the forward of {path!r} was replaced (accelerate's hooks do that), and would be "
                "lost; take it off first"
            )
        if layer.experts and layer.quant_state is None and any(vars(layer)[hooks] for hooks in HOOKS):
            raise ValueError(
                f"{caller}: {path!r} has hooks, which a parameter of its experts module cannot have; remove them first"
            )


def _replaced(root: nn.Module, layer: GLoRALinear) -> nn.Module:
    """Put the plain module in every place of a layer, and return it."""
    plain = layer.as_plain()
    with all_or_none() as undo:
        for parent in list(root.modules()):
            for name, child in list(parent._modules.items()):
                if child is layer and isinstance(plain, ExpertLinear) and plain.quant_state is None:
                    give_back(parent, name, plain, undo)
                elif child is layer:
                    undo.callback(parent._modules.__setitem__, name, layer)
                    parent._modules[name] = plain
    return plain


def _thaw(root: nn.Module) -> None:
    """Undo the other changes of `inject`: marks, frozen parameters, hooks, codes kept from repacking."""
    forget_tied(root)
    free_codes(root)
    keep_names(root)
    unguard(root)
    for module in root.modules():
        vars(module).pop(TRAINED, None)
        for name in vars(module).pop(FROZEN, ()):
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(True)
