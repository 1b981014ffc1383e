"""Models without GLoRA layers again: merged, and every layer the plain module that it was made from."""

from __future__ import annotations

import warnings
from typing import overload

from torch import nn

from glora_kernels.nn.base import M
from glora_kernels.nn.biases import added_biases, keep_biases, warn_of_biases
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.mergeable import FROZEN, UNSHARD
from glora_kernels.nn.merging import adds_bias, named
from glora_kernels.nn.model import TRAINED, all_paths, layers_of, refuse_four_bit, refuse_tied, unwrap
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.requantize import MergeReport
from glora_kernels.nn.share import forget_tied
from glora_kernels.nn.undo import all_or_none
from glora_kernels.nn.wide import narrow, narrowed
from glora_kernels.quant.bnb import free_codes
from glora_kernels.runtime.progress import progress as shown


@overload
def merge_and_unload(model: GLoRALinear, requantize: bool = False, *, progress: bool = False) -> nn.Module: ...
@overload
def merge_and_unload(model: M, requantize: bool = False, *, progress: bool = False) -> M: ...
def merge_and_unload(model: nn.Module, requantize: bool = False, *, progress: bool = False) -> nn.Module:
    """Merge every GLoRA layer and put the plain module that it was made from in its place: a model to deploy.

    The result has `nn.Linear`, transformers' `Conv1D`, `QuantizedLinear` and bitsandbytes' `Linear4bit` modules as
    before `inject`, of the same classes, on the same Parameters; what `inject` froze requires a gradient again, and
    what it trained in fp32 inside a 16-bit model is rounded to 16 bits. It needs nothing of this package: save,
    quantize, export or trace it as any other.

        model = gk.merge_and_unload(model)
        model.save_pretrained("merged")

    Layer by layer, so that only one layer's base is held a second time. Whatever can be refused is refused before the
    first is changed. A signal in between leaves each layer as it was, or merged; call it again to go on.

    Where a layer without a bias gets one (C, E), a model of transformers drops it when it is loaded, unless its
    configuration says so: the flag that does is looked for and set, and the other layers that it is for get a bias of
    zeros. Where there is none, a warning.

    Args:
        model: with GLoRA layers, merged or not; changed in place. Also inside torch.compile.
        requantize: as in `merge`: over 4 bits, round the merged weights to 4 bits again, with a warning that holds the
            report. `GLoRALinear.to_linear(dtype)` gives dense layers instead.
        progress: show how far along it is on stderr.

    Returns:
        The model; where it is itself a GLoRA layer, the plain one.

    Raises:
        ValueError: the model has no GLoRA layer, is sharded or inside DistributedDataParallel, has tied weights that
            would change, merged or rounded values that hold NaN or inf, or a layer whose forward was replaced.
        RuntimeError: a layer is disabled, or has a 4-bit base and `requantize` is False.
    """
    layers, root = layers_of(model, "merge_and_unload"), unwrap(model)
    _check(model, root, layers)
    unmerged = {path: layer for path, layer in layers.items() if not layer.merged}
    refuse_four_bit("merge_and_unload", unmerged, requantize)
    refuse_tied("merge_and_unload", root, unmerged)
    for path, layer in unmerged.items():
        layer.check_mergeable()
        with named(path):
            layer.merged_values()
    narrow_values = narrowed(root)
    biases = added_biases(root, (path for path, layer in layers.items() if adds_bias(layer)))
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


def _check(model: nn.Module, root: nn.Module, layers: dict[str, GLoRALinear]) -> None:
    refuse_sharded(root, "merge_and_unload", UNSHARD)
    wrapper = model
    while wrapper is not root:
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            raise ValueError("merge_and_unload: the model is wrapped in DistributedDataParallel; pass model.module")
        wrapper = wrapper._modules["_orig_mod" if "_orig_mod" in wrapper._modules else "module"]  # type: ignore[assignment]
    if model is not root and isinstance(root, GLoRALinear):
        raise ValueError("merge_and_unload: a single wrapped layer cannot be replaced; pass the layer itself")
    for path, layer in layers.items():
        if "forward" in vars(layer):
            raise ValueError(
                f"merge_and_unload: the forward of {path!r} was replaced (accelerate's hooks do that), and would be "
                "lost; take it off first"
            )


def _replaced(root: nn.Module, layer: GLoRALinear) -> nn.Module:
    """Put the plain module in every place of a merged layer."""
    plain = layer.to_plain()
    with all_or_none() as undo:
        for parent in root.modules():
            for name, child in parent._modules.items():
                if child is layer:
                    undo.callback(parent._modules.__setitem__, name, layer)
                    parent._modules[name] = plain
    return plain


def _thaw(root: nn.Module) -> None:
    """Undo what `inject` has done to the other modules: marks, frozen parameters, hooks, codes kept from repacking."""
    forget_tied(root)
    free_codes(root)
    for module in root.modules():
        vars(module).pop(TRAINED, None)
        for name in vars(module).pop(FROZEN, ()):
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(True)
