"""Adapters swapped in place: the values of a file for a while, in the memory of the model's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

from glora_kernels.nn.adapter import load_adapter
from glora_kernels.nn.model import layers_of, trained_of, unwrap


@contextlib.contextmanager
def using(model: nn.Module, path: str | os.PathLike[str]) -> Iterator[nn.Module]:
    """Inside, the model's first adapter and the modules trained whole have the values of a file; after it, their own.

    The parameters stay the same objects, so nothing is compiled again and an optimizer may hold them; what is trained
    inside is lost. An adapter of another configuration is added by `load_adapter(name=)` and chosen by `set_adapter`.

    Args:
        model: with GLoRA layers of the file's configuration.
        path: a file of `save_adapter`.

    Raises:
        ValueError: and the other errors of `load_adapter`, before anything has changed.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> gk.save_adapter(model, "best.safetensors")
        >>> with gk.using(model, "best.safetensors"):
        ...     y = model(torch.randn(2, 16))
    """
    layers = layers_of(model, "using")
    held = [p for layer in layers.values() for p in layer.adapter().values()]
    held += [t for module in trained_of(unwrap(model)).values() for t in module.state_dict(keep_vars=True).values()]
    biases = [(layer.bias, layer.bias.requires_grad) for layer in layers.values() if layer.bias is not None]
    held += [bias for bias, _ in biases]  # a file may have one that is not trained here
    before = [(tensor, tensor.detach().clone()) for tensor in {id(t): t for t in held}.values()]
    try:
        yield load_adapter(model, path)
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
        for bias, trained in biases:
            bias.requires_grad_(trained)
