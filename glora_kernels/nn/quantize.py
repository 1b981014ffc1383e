"""Quantizing linear layers, alone or all of a model's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from glora_kernels.launch.progress import progress as shown
from glora_kernels.nn.base import base_of
from glora_kernels.nn.frozen import QuantizedLinear, check_dtype
from glora_kernels.nn.inject import Linear, check_replaceable, check_wrapper, find_targets, linears, patterns_of
from glora_kernels.nn.model import named_layers, unwrap
from glora_kernels.quant import QuantizedWeight, quantize_weight
from glora_kernels.quant.codes import QUANT_TYPES
from glora_kernels.quant.weight import DTYPES, check_blocksize


def quantize(
    module: nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    target_modules: str | Iterable[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """The 4-bit layer of a linear layer; or every linear layer of a model but the head, replaced in place.

    The codes are those of bitsandbytes (`Linear4bit`), which is not needed. Inject afterwards; a model whose
    `Linear4bit` layers bitsandbytes has quantized is injected as it is.

        model = gk.quantize(model, "nf4", double_quant=True)
        model = gk.inject(model, gk.GLoRAConfig(A="vector", B="lora", C="vector"))

    Args:
        module: an `nn.Linear` or a transformers `Conv1D`, which stays as it is; or any other module, whose layers are
            replaced in place. On the device where it is.
        quant_type: "nf4" or "fp4".
        blocksize: how many weights of the flat matrix have one absmax: 32, 64, ... 4096.
        double_quant: absmax in 8 bits itself: 4.13 bits a weight at blocksize 64, instead of 4.5.
        compute_dtype: what the layers cast x to, and y back from; None means that x decides.
        target_modules: of a model, which layers, as in `inject`; None means every linear layer but the head and those
            that a transformers model keeps in fp32 (`_keep_in_fp32_modules`: T5's wo).
        progress: show how far along it is on stderr.

    Returns:
        A `QuantizedLinear`, or the model.

    Raises:
        ValueError: an unknown type or block size; a pattern that matches nothing, GLoRA layers in the model, a layer
            that cannot be replaced, is in 4 bits already, is on the meta device or holds NaN or inf. Nothing has
            changed then.
        TypeError: a weight in float64, or an argument of the wrong kind.
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {', '.join(map(repr, QUANT_TYPES))}; got {quant_type!r}")
    check_blocksize(blocksize)
    if compute_dtype is not None:
        check_dtype("compute_dtype", compute_dtype)
    root = unwrap(module)
    if named_layers(root):
        raise ValueError(f"quantize: the model has GLoRA layers already ({next(iter(named_layers(root)))!r}, ...)")
    targets = None if target_modules is None else patterns_of("target_modules", target_modules)
    every, chosen = find_targets(root, targets, {})
    if linears(root) and every[0].module is root:
        chosen = every
    if targets is None and every and every[0].module is not root:
        chosen = [linear for linear in chosen if not _kept_wide(root, linear)]
    if not chosen:
        raise ValueError("quantize: the model has no linear layer to quantize")
    check_wrapper(module, root)
    for linear in chosen:
        check_replaceable(linear)
        _check_quantizable(linear)
    made: dict[tuple[int, bool], QuantizedWeight] = {}  # layers that share one weight go on sharing it
    layers = []
    for linear in shown(chosen, "quantizing", progress):
        base = base_of(linear.module)
        assert base is not None
        key = id(base.weight), base.transposed
        if key not in made:
            dense = base.weight.t() if base.transposed else base.weight
            try:
                made[key] = quantize_weight(dense, quant_type, blocksize, double_quant)
            except ValueError as error:
                raise ValueError(f"quantize: {linear.paths[0]!r}: {error}") from error
        bias = None if base.bias is None else base.bias.detach().clone()
        layers.append(QuantizedLinear(made[key], bias, compute_dtype).train(linear.module.training))
    for linear, layer in zip(chosen, layers, strict=True):  # nothing below can fail
        for parent, name in linear.parents:
            if parent is not None:
                parent._modules[name] = layer
    return layers[0] if every[0].module is root else module


def _kept_wide(root: nn.Module, linear: Linear) -> bool:
    """Whether a transformers model says that a layer is to stay in fp32: T5 casts x to the dtype of its `wo`."""
    lists = (getattr(root, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    names = {name for found in lists if found for name in found}
    return any(part in names for path in linear.paths for part in path.split("."))


def _check_quantizable(linear: Linear) -> None:
    """The errors of `quantize_weight`, and of a layer in 4 bits."""
    base = base_of(linear.module)
    assert base is not None
    what = f"quantize: {linear.paths[0]!r}" if linear.paths[0] else "quantize: the layer"
    if base.quant_state is not None:
        raise ValueError(f"{what} is in 4 bits already")
    if base.dtype not in DTYPES:
        raise TypeError(f"{what} has a weight in {base.dtype}; accepted: float32, bfloat16, float16")
    if base.weight.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values")
    if not bool(torch.isfinite(base.weight).all()):
        raise ValueError(f"{what} holds NaN or inf, which have no 4-bit code")
