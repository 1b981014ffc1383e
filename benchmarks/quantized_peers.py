"""Contestants on a 4-bit base: one weight in NF4, decoded by everybody to the same numbers.

The base is a layer of this library; bitsandbytes, PEFT and Unsloth get a `Linear4bit` on the same memory. What they
compute is compared with float64 on the decoded weight. In "bnb" the product is bitsandbytes' own choice: its
`gemm_4bit` for few tokens, dequantize + cuBLAS for many, and LoRA is two thin products beside it; "eager" is
dequantize + cuBLAS at any size, with the formula around it; in "compile" decoding too is left to torch.compile.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import glora_kernels as gk
from benchmarks import cases
from benchmarks.battery import DecodeEntry, Entry
from benchmarks.cases import Contestant, Problem
from glora_kernels import GLoRAConfig, QuantizedLinear, reference
from glora_kernels.quant import QuantizedWeight
from glora_kernels.quant.codes import codebook


class Unavailable(Exception):
    """A contestant that cannot be built here; the message is the reason."""


def quantized(problem: Problem) -> Problem:
    """The problem on a 4-bit base (NF4, blocks of 64, double quantization); its weight is the one decoded again."""
    layer = gk.quantize(cases.base_layer(problem), "nf4", double_quant=True)
    assert isinstance(layer, QuantizedLinear)
    return replace(problem, weight=layer.to_linear(problem.shape.dtype).weight.detach(), base=layer)


def build(entry: Entry, problem: Problem) -> Contestant:
    """The contestant of an entry on a problem of `quantized`.

    Raises:
        Unavailable: it cannot be built here.
        ImportError, AttributeError, NotImplementedError: neither.
    """
    builders: dict[str, Callable[[Entry, Problem], Contestant]] = {
        "ours": _ours, "bnb": _bitsandbytes, "peft": _peft, "eager": _eager, "compile": _compiled, "unsloth": _unsloth,
    }  # fmt: skip
    if entry.impl not in builders:
        raise Unavailable(f"{entry.impl} has no layer on a 4-bit base")
    return builders[entry.impl](entry, problem)


def linear4bit(problem: Problem) -> Any:
    """The base as bitsandbytes' layer, on the same memory.

    Raises:
        Unavailable: bitsandbytes is not installed or cannot run here.
    """
    assert isinstance(problem.base, QuantizedLinear)
    try:
        return problem.base.to_linear4bit()
    except (ImportError, RuntimeError) as reason:
        raise Unavailable(f"bitsandbytes: {reason}") from reason


def lora(base: Callable[[Tensor], Tensor], config: GLoRAConfig, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Any base, and the two thin products of LoRA beside it."""
    return base(x) + config.scale * F.linear(F.linear(x, params["B_down"]), params["B_up"])


def decoded(packed: Tensor, absmax: Tensor, code: Tensor, nested: tuple[Tensor, ...], form: tuple[Any, ...]) -> Tensor:
    """The weight as one expression, for torch.compile to fuse: `codec_tensors` has the arguments."""
    shape, blocksize, nested_blocksize, dtype = form
    if nested:
        inner, inner_code, offset = nested
        scales = inner.repeat_interleave(nested_blocksize)[: len(absmax)]
        absmax = inner_code[absmax.int()] * scales + offset
    nibbles = torch.stack((packed >> 4, packed & 15), -1).view(-1, blocksize)
    return (code[nibbles.int()] * absmax[:, None]).to(dtype).view(shape)


def codec_tensors(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `decoded`."""
    state, nested = weight.state, weight.state.nested
    code = codebook(state.quant_type, weight.device)
    inner = () if nested is None else (nested.absmax, nested.code, nested.offset)
    form = (tuple(state.shape), state.blocksize, 0 if nested is None else nested.blocksize, dtype)
    return weight.packed.detach().view(-1), state.absmax, code, inner, form


def _ours(entry: Entry, problem: Problem) -> Contestant:
    if entry.frozen:
        assert problem.base is not None
        return Contestant(entry.case, "ours", problem.base)
    return cases.ours(problem)


def _bitsandbytes(entry: Entry, problem: Problem) -> Contestant:
    layer = linear4bit(problem)
    if entry.frozen:
        return Contestant(entry.case, "bnb", layer)
    if entry.adapter != "lora":
        raise Unavailable("bitsandbytes has the 4-bit base; GLoRA beside it needs the weight itself: see eager")
    return _functional(problem, functools.partial(lora, layer, problem.config))


def _eager(entry: Entry, problem: Problem) -> Contestant:
    layer = linear4bit(problem)
    dequantize = importlib.import_module("bitsandbytes").functional.dequantize_4bit

    def weight() -> Tensor:
        return dequantize(layer.weight.data, layer.weight.quant_state).to(problem.shape.dtype)

    if entry.adapter == "lora":
        base = lambda x: F.linear(x, weight(), problem.bias)  # noqa: E731
        return _functional(problem, functools.partial(lora, base, problem.config))
    return _functional(
        problem, lambda x, params: reference.glora_linear(x, weight(), problem.bias, params, problem.config)
    )


def _compiled(entry: Entry, problem: Problem) -> Contestant:
    assert isinstance(problem.base, QuantizedLinear)
    weight = problem.base.base_weight()
    assert isinstance(weight, QuantizedWeight)
    tensors, function = codec_tensors(weight, problem.shape.dtype), _compiled_function(problem.config)
    return _functional(problem, lambda x, params: function(x, tensors, problem.bias, params))


@functools.lru_cache(maxsize=64)
def _compiled_function(config: GLoRAConfig) -> Callable[..., Tensor]:
    """One compiled function a configuration: layers of one shape share its code."""
    plain = cases.config_case(config) == "lora"

    def step(x: Tensor, tensors: tuple[Any, ...], bias: Tensor | None, params: dict[str, Tensor]) -> Tensor:
        weight = decoded(*tensors)
        if plain:
            return lora(lambda x: F.linear(x, weight, bias), config, x, params)
        return reference.glora_linear(x, weight, bias, params, config)

    return torch.compile(step, fullgraph=True, dynamic=False)


def _functional(problem: Problem, function: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Contestant:
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    return Contestant("", "", lambda x: function(x, params), params)


def _peft(entry: Entry, problem: Problem) -> Contestant:
    try:
        return cases.peft(replace(problem, base=linear4bit(problem)))
    except ValueError as reason:
        raise Unavailable(f"PEFT: {reason}") from reason


def _unsloth(entry: Entry, problem: Problem) -> Contestant:
    """`LoRA_W`, its single-projection LoRA; for few tokens `fast_linear_forward`, which takes a PEFT layer."""
    if entry.adapter != "lora" or problem.bias is not None or problem.config.dropout:
        raise Unavailable("Unsloth is timed as LoRA without bias and dropout")
    if isinstance(entry, DecodeEntry):
        function = importlib.import_module("unsloth.kernels.utils").fast_linear_forward
        inner = _peft(entry, problem)
        return Contestant("", "", lambda x: function(inner.forward, x[:, None])[:, 0], inner.params)
    apply = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W.apply
    layer, scale = linear4bit(problem), problem.config.scale

    def forward(x: Tensor, params: dict[str, Tensor]) -> Tensor:
        weight: Any = layer.weight
        return apply(x[None], weight.data, weight.quant_state, params["B_down"], params["B_up"], scale)[0]

    return _functional(problem, forward)
