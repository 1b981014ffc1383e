"""The original implementation's numbers through PEFT's GLoRA layer, accelerated, wherever PEFT can express them.

PEFT has one form for A and B and one for D and E, C and D and E only beside a bias; 36 of the 432 configurations
with a bias, 4 without. Its tensors are the file's: a vector is column 0 of `_up`, a constant its element [0,0].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import GloraConfig, get_peft_model
from torch import nn
from twins import assert_same, step

import glora_kernels as gk

GOLDEN = dict(np.load(Path(__file__).parents[1] / "data" / "glora_432.npz"))
RANK, K, N = 4, 12, 7
FORMS = [tuple(map(str, row)) for row in GOLDEN["configs"]]
SHAPES = {"A": (N, 1), "B": (N, 1), "C": (K, 1), "D": (N,), "E": (N,)}


def tensor(name, *at):
    return torch.from_numpy(GOLDEN[name][at].copy())


def expressible(form, bias):
    a, b, c, d, e = form
    return a == b and d == e and (bias or (c, d) == ("none", "none"))


def parts_of(letter, form):
    """PEFT's parameters of a support, each with the file's array and where in it the numbers lie."""
    if form == "lora":
        return {"Xd": (f"{letter}_up", (), None), "Xu": (f"{letter}_down", (), None)}
    if form == "none":
        return {}
    name = letter if letter in "DE" else f"{letter}_up"
    first = slice(None) if form == "vector" else slice(1)
    return {"X": (name, (first,) if letter in "DE" else (first, 0), SHAPES[letter] if form == "vector" else (1,))}


def golden_model(form, bias):
    model = nn.ModuleDict({"layer": nn.Linear(K, N, bias=bias)}).double()
    model["layer"].weight.data = tensor("weight")
    if bias:
        model["layer"].bias.data = tensor("bias")
    config = GloraConfig(
        r=RANK, target_modules=["layer"], config_A_B=form[0], config_C=form[2], config_D_E=form[3]
    )  # fmt: skip
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = model.base_model.model["layer"]
    for letter, kind in zip("ABCDE", form, strict=True):
        for part, (name, at, shape) in parts_of(letter, kind).items():
            value = tensor(name, *at)
            path = getattr(layer, f"glora_{letter}")["default"]
            assert getattr(path, part).shape == (shape or value.shape)
            getattr(path, part).data = value.reshape(getattr(path, part).shape)
    return gk.accelerate(model, verbose=False), layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_golden(calls, bias):
    """y, dx and the gradient of every support, each on our operators."""
    seen = 0
    for i, form in enumerate(FORMS):
        if not expressible(form, bias):
            continue
        seen += 1
        at = (0 if bias else 1, i)
        _, layer = golden_model(form, bias)
        got = step(layer, tensor("x"), tensor("dy"))
        expected = {"y": tensor("y", *at), "x": tensor("dx", *at)}
        for letter, kind in zip("ABCDE", form, strict=True):
            for part, (name, where, shape) in parts_of(letter, kind).items():
                value = tensor(f"d{name}", *at)[where]
                expected[f"glora_{letter}.default.{part}"] = value.reshape(shape or value.shape)
        assert_same(got, expected)
        assert len(calls) == seen
    assert seen == (36 if bias else 4)
