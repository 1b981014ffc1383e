"""Every contestant of the battery from its entry: ours, eager PyTorch, torch.compile, and the peers.

Those on a 4-bit base are in `benchmarks.quantized_peers`.

A peer that is not installed, or that has no layer for a case, raises `Unavailable` with the reason; the battery
records it and goes on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cases, quantized_peers
from benchmarks.battery import Entry
from benchmarks.cases import Contestant, Problem
from benchmarks.quantized_peers import Unavailable
from glora_kernels import GLoRAConfig, reference

PACKAGES = {"peft": "peft", "bnb": "bitsandbytes", "unsloth": "unsloth", "lorafusion": "lorafusion"}


def unavailable() -> dict[str, str]:
    """The peers that are not installed, with the reason. Nothing is imported: some patch others on import."""
    return {
        impl: f"{package} is not installed"
        for impl, package in PACKAGES.items()
        if not importlib.util.find_spec(package)
    }


def build(entry: Entry, problem: Problem) -> Contestant:
    """The contestant of an entry, with the problem's values.

    Raises:
        Unavailable: it cannot be built here.
    """
    if entry.impl in PACKAGES and not importlib.util.find_spec(PACKAGES[entry.impl]):
        raise Unavailable(f"{PACKAGES[entry.impl]} is not installed")
    builders: dict[str, Callable[[Entry, Problem], Contestant]] = {
        "ours": _ours, "eager": _eager, "compile": _compiled, "peft": _peft,
        "bnb": _bitsandbytes, "unsloth": _unsloth, "lorafusion": _lorafusion,
    }  # fmt: skip
    builder = builders[entry.impl] if problem.base is None else quantized_peers.build
    try:
        found = builder(entry, problem)
    except (ImportError, AttributeError, NotImplementedError) as reason:
        raise Unavailable(f"{type(reason).__name__}: {reason}") from reason
    return replace(found, case=entry.case, impl=entry.impl)


def _ours(entry: Entry, problem: Problem) -> Contestant:
    return cases.ours(problem)


def _eager(entry: Entry, problem: Problem) -> Contestant:
    if entry.frozen:
        return cases.frozen(problem)
    if problem.config.dropout and entry.adapter != "lora":
        raise Unavailable("the literal formula is timed without dropout")
    if entry.adapter != "lora":
        return cases.eager(problem)
    function = functools.partial(_lora, problem.config)
    return _functional(entry, problem, function)


def _compiled(entry: Entry, problem: Problem) -> Contestant:
    return _functional(entry, problem, _compiled_function(problem.config))


@functools.lru_cache(maxsize=64)
def _compiled_function(config: GLoRAConfig) -> Callable[..., Tensor]:
    """One compiled function a configuration: layers of one shape share its code."""
    lora = cases.config_case(config) == "lora"
    function: Callable[..., Tensor] = functools.partial(_lora if lora else _literal, config)
    return torch.compile(function, fullgraph=True, dynamic=False)


def _lora(config: GLoRAConfig, x: Tensor, weight: Tensor, bias: Tensor | None, params: dict[str, Tensor]) -> Tensor:
    """LoRA as everybody writes it: the base, and the two thin products beside it."""
    dropped = F.dropout(x, config.dropout) if config.dropout else x
    low = F.linear(F.linear(dropped, params["B_down"]), params["B_up"])
    return F.linear(x, weight, bias) + config.scale * low


def _literal(config: GLoRAConfig, x: Tensor, weight: Tensor, bias: Tensor | None, params: dict[str, Tensor]) -> Tensor:
    return reference.glora_linear(x, weight, bias, params, config)


def _functional(entry: Entry, problem: Problem, function: Callable[..., Tensor]) -> Contestant:
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    return Contestant(entry.case, entry.impl, lambda x: function(x, problem.weight, problem.bias, params), params)


def _peft(entry: Entry, problem: Problem) -> Contestant:
    try:
        return cases.peft(problem)
    except ValueError as reason:
        raise Unavailable(str(reason)) from reason


def _bitsandbytes(entry: Entry, problem: Problem) -> Contestant:
    raise Unavailable("bitsandbytes has layers on a 4-bit base only")


def _unsloth(entry: Entry, problem: Problem) -> Contestant:
    """unsloth.kernels.fast_lora.LoRA_W, its single-projection LoRA, which takes 3-D input."""
    _plain_lora(entry, problem, "Unsloth's LoRA_W")
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    scale = problem.config.scale

    def forward(x: Tensor) -> Tensor:
        return function.apply(x[None], problem.weight, None, params["B_down"], params["B_up"], scale)[0]

    return Contestant(entry.case, "unsloth", forward, params)


def _lorafusion(entry: Entry, problem: Problem) -> Contestant:
    """lorafusion.ops.lora_v1.FusedLinearLoRA, which takes 3-D input and the scale as alpha."""
    _plain_lora(entry, problem, "LoRAFusion's FusedLinearLoRA")
    function = importlib.import_module("lorafusion.ops.lora_v1").FusedLinearLoRA
    params = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    scale = problem.config.scale

    def forward(x: Tensor) -> Tensor:
        return function.apply(x[None], problem.weight, params["B_down"], params["B_up"], scale, 0.0, None, None)[0]

    return Contestant(entry.case, "lorafusion", forward, params)


def _plain_lora(entry: Entry, problem: Problem, name: str) -> None:
    if entry.case != "lora" or problem.bias is not None or problem.config.dropout:
        raise Unavailable(f"{name} is timed as LoRA without bias and dropout")
