"""Quantizing a linear layer, or the linear layers of a model, to 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import nn

from glora_kernels.nn.base import M
from glora_kernels.nn.experts import ExpertLinear, keep_names
from glora_kernels.nn.frozen import FrozenBase, QuantizedLinear, check_dtype
from glora_kernels.nn.inject import check_replaceable, check_wrapper, refuse_adapted
from glora_kernels.nn.model import all_paths, unwrap
from glora_kernels.nn.patterns import patterns_of
from glora_kernels.nn.targets import Linear, find_targets, put, targets_of
from glora_kernels.nn.undo import all_or_none
from glora_kernels.quant import QuantizedWeight, quantize_weight
from glora_kernels.quant.codes import QUANT_TYPES
from glora_kernels.quant.weight import check_blocksize
from glora_kernels.runtime.progress import progress as shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

QuantType = Literal["nf4", "fp4"]
"""The values of `QUANT_TYPES`, for type checkers."""


class _Options(TypedDict, total=False):
    blocksize: int
    double_quant: bool
    compute_dtype: torch.dtype | None
    target_modules: str | Iterable[str] | None
    exclude_modules: str | Iterable[str]
    target_parameters: str | Iterable[str]
    progress: bool


@overload
def quantize(module: nn.Linear, quant_type: QuantType = "nf4", **options: Unpack[_Options]) -> QuantizedLinear: ...
@overload
def quantize(module: M, quant_type: QuantType = "nf4", **options: Unpack[_Options]) -> M: ...
def quantize(
    module: nn.Module,
    quant_type: QuantType = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] = (),
    target_parameters: str | Iterable[str] = (),
    progress: bool = False,
) -> nn.Module:
    """Return a 4-bit layer made from a linear layer; or replace every linear layer of a model but the head, in place.

    The codes are those of bitsandbytes (`Linear4bit`), which need not be installed. Call `inject` afterwards; a model
    whose `Linear4bit` layers bitsandbytes has quantized can be injected directly.

        model = gk.quantize(model, "nf4", double_quant=True)
        model = gk.inject(model, gk.GLoRAConfig(A="vector", B="lora", C="vector"))

    Args:
        module: an `nn.Linear` or a transformers `Conv1D`, which stays as it is; or any other module, whose layers are
            replaced in place. The result is on the same device. Of an experts module of transformers, it is the weights
            of its products.
        quant_type: "nf4" or "fp4".
        blocksize: the number of consecutive weights of the flat matrix that share one absmax: 32, 64, ... 4096.
        double_quant: store absmax in 8 bits: 4.13 bits a weight at blocksize 64, instead of 4.5.
        compute_dtype: the dtype that the layers cast x to; y is cast back. None: x stays as it is.
        target_modules: the layers of a model to quantize, as in `inject`. None or "all-linear" means every linear layer
            except the head, those that a transformers model keeps in fp32 (`_keep_in_fp32_modules`: T5's wo), and
            those that share their weight with a module that stays dense (an embedding).
        exclude_modules: layers among these to leave out, as in `inject`.
        target_parameters: patterns of the weights of experts, as in `inject`: the codes are those of (E·N, K), in
            which every expert has whole blocks. Experts that nothing names stay dense.
        progress: show the progress on stderr.

    Returns:
        A `QuantizedLinear`, or the model.

    Raises:
        ValueError: an unknown type or block size; a pattern that matches nothing; GLoRA or PEFT layers in the model; a
            layer that cannot be replaced, is in 4 bits already, is one of experts with N·K no multiple of blocksize, or
            whose weight is read by other code, is on the meta device, holds NaN or inf, or is shared with a module that
            stays dense. The model is unchanged.
        TypeError: a weight in float64, or an argument of the wrong kind.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> model = gk.quantize(model, "nf4", double_quant=True, target_modules=["0"])
        >>> [type(layer).__name__ for layer in model]
        ['QuantizedLinear', 'Linear']
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {', '.join(map(repr, QUANT_TYPES))}; got {quant_type!r}")
    check_blocksize(blocksize)
    check_dtype("compute_dtype", compute_dtype)
    root = unwrap(module)
    refuse_adapted("quantize", root)
    chosen = to_quantize(root, target_modules, exclude_modules, target_parameters)
    if convolutions := [linear for linear in chosen if linear.is_convolution]:
        raise ValueError(
            f"quantize: {_named(convolutions[0])} is a convolution; accepted are linear layers and experts"
        )
    check_wrapper(module, root)
    check_replaceable(root, chosen)
    for path, other in _half_tied(root, chosen).items():
        raise ValueError(
            f"quantize: {path!r} shares its weight with {other!r}, which stays dense, so that nothing would be saved; "
            "leave it out of target_modules, or give it a weight of its own first"
        )
    if packed := [linear for linear in chosen if linear.base.quant_state is not None]:
        raise ValueError(f"quantize: {_named(packed[0])} is in 4 bits already")
    for linear in chosen:
        if linear.experts and (size := linear.base.shape[0] * linear.base.shape[1]) % blocksize:
            raise ValueError(
                f"quantize: {_named(linear)} has N·K = {size} numbers an expert, which is no multiple of "
                f"blocksize={blocksize}, so that a block would belong to two experts; leave it out, or give a "
                "blocksize that divides it"
            )
    made: dict[tuple[int, bool], QuantizedWeight] = {}  # layers with one weight share its codes
    layers = []
    for linear in shown(chosen, "quantizing", progress):
        base = linear.base
        key = id(base.weight), base.transposed
        if key not in made:
            dense = base.weight.mT if base.transposed else base.weight
            dense = dense.reshape(-1, dense.shape[-1])
            try:
                made[key] = quantize_weight(dense, quant_type, blocksize, double_quant)
            except (TypeError, ValueError) as error:
                raise type(error)(f"quantize: {_named(linear)}: {error}") from error
        bias = None if base.bias is None else base.bias.detach().clone()
        layer: FrozenBase
        if linear.experts:
            layer = ExpertLinear(made[key], bias, linear.experts, compute_dtype=compute_dtype)
        else:
            layer = QuantizedLinear(made[key], bias, compute_dtype)
        layers.append(layer.train(linear.module.training))
    with all_or_none() as undo:
        undo.callback(keep_names, root)
        for linear, layer in zip(chosen, layers, strict=True):
            put(linear, layer, undo)
        keep_names(root)
    return layers[0] if chosen[0].module is root else module


def to_quantize(root: nn.Module, target_modules: Any, exclude_modules: Any, target_parameters: Any) -> list[Linear]:
    """The linear layers of a model to quantize; the model where it is one itself."""
    parameters = patterns_of("target_parameters", target_parameters)
    targets = targets_of(target_modules, parameters)
    excluded = patterns_of("exclude_modules", exclude_modules)
    every, chosen = find_targets(root, targets, {}, excluded, parameters=parameters)
    if every and every[0].module is root:
        chosen = every
    elif targets is None and not parameters and every and every[0].owner is root:  # an experts module
        chosen = [linear for linear in every if linear.owner is root]
    elif targets is None and every:
        chosen = [linear for linear in chosen if not _kept_wide(root, linear)]
        chosen = [linear for linear in chosen if linear.path not in _half_tied(root, chosen)]
    if not chosen:
        raise ValueError("quantize: the model has no linear layer to quantize")
    return chosen


def _kept_wide(root: nn.Module, linear: Linear) -> bool:
    """Whether a transformers model asks to keep a layer in fp32, as T5 does: it casts x to the dtype of `wo`."""
    lists = (getattr(root, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    names = {name for found in lists if found for name in found}
    return any(part in names for path in linear.paths for part in path.split("."))


def _half_tied(root: nn.Module, chosen: list[Linear]) -> dict[str, str]:
    """The chosen layers that share their weight with a module that is not chosen: path → the other's path."""
    modules = {id(linear.module) for linear in chosen}
    products = {(id(parent), name) for linear in chosen if linear.experts for parent, name in linear.parents}
    others = {
        id(parameter): path
        for path, module in all_paths(root)
        if id(module) not in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and (id(module), name) not in products
    }
    owned = {linear.path: id(linear.module._parameters.get("weight")) for linear in chosen}
    return {path: others[weight] for path, weight in owned.items() if weight in others}


def _named(linear: Linear) -> str:
    return repr(linear.path) if linear.path else "the layer"
