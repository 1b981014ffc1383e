"""Finds the kernels of a layer, or of several used together, by planning a call for a card that need not be here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import glora_kernels
from glora_kernels.dispatch.common import path_of
from glora_kernels.four_bit.cuda import CudaLaunch
from glora_kernels.nn import GLoRALinear, QuantizedLinear, deferred_shared_grads, fuse_siblings, inject, shift_once
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch, LibraryProduct
from glora_kernels.runtime.routes import TRITON_DTYPES
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M
from glora_kernels.spec import GLoRAConfig, Share, ShareLoRAConfig
from glora_kernels.tools import planned
from glora_kernels.tools.planned import Decided, How, Linear, Traced

_SLICES = {"_grouped_": "grouped", "_expert_": "experts"}
"""The operators whose kernels have a name of their own, and that name."""

Call = Callable[[Tensor], Any]
"""A module, or any function of x."""


class Step(NamedTuple):
    """One launch of ours, or one GEMM of the vendor's library, of which only `kernel` is set."""

    kernel: str
    file: str = ""
    grid: str = ""
    blocks: str = ""
    warps: int = 0
    stages: int = 0
    features: str = ""
    source: str = ""


@dataclass(frozen=True)
class Plan:
    """The steps of one pass, the file and line that launch them, the route of its large product and what decided it."""

    steps: list[Step]
    through: str
    route: str
    decided_by: str

    @property
    def launches(self) -> int:
        return sum(step.file != "" for step in self.steps)

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"steps": [step._asdict() for step in self.steps], "launches": self.launches}

    def count(self) -> str:
        """The numbers of our launches and of the library's products, as text."""
        products = len(self.steps) - self.launches
        text = f"{self.launches} launch{'' if self.launches == 1 else 'es'}"
        return text + (f", {products} library product{'' if products == 1 else 's'}" if products else "")


class Together(nn.Module):
    """Layers that read one x."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def base(n: int, k: int, dtype: torch.dtype, bias: bool, four_bit: str | None) -> nn.Module:
    """A frozen linear layer on the meta device, dense or 4-bit."""
    linear = nn.Linear(k, n, bias, device="meta", dtype=dtype)
    return linear if four_bit is None else QuantizedLinear(codes(n, k, dtype, four_bit), linear.bias)


def codes(n: int, k: int, dtype: torch.dtype, four_bit: str) -> QuantizedWeight:
    """A weight (N,K) in 4 bits on the meta device."""
    weight: QuantizedWeight = planned.weight_of(
        Linear(GLoRAConfig.lora(1), n, k, quant_type=four_bit), How(1, dtype, "")
    )
    return weight


def fused(bases: Sequence[nn.Module], config: GLoRAConfig) -> nn.Module:
    """A GLoRA layer over each base; several are fused, as layers that read one x.

    Raises:
        ValueError: layers of this kind cannot be fused.
    """
    layers = [GLoRALinear.from_linear(each, config) for each in bases]
    if len(layers) == 1:
        return layers[0]
    model = Together(layers)
    fuse_siblings(model, [[f"layers.{i}" for i in range(len(layers))]])
    return model


def shared(bases: Sequence[nn.Module], config: GLoRAConfig, share: Share) -> Call:
    """Layers that share factors over depth, inside `shift_once` and `deferred_shared_grads`.

    Raises:
        ValueError: the configuration is not one of ShareLoRA.
    """
    model = inject(Together(bases), sharing(config, share), target_modules=["layers.*"])

    def call(x: Tensor) -> Any:
        with shift_once(model), deferred_shared_grads(model):
            return model(x)

    return call


def sharing(config: GLoRAConfig, share: Share) -> ShareLoRAConfig:
    """The configuration whose layers share factors over depth.

    Raises:
        ValueError: the configuration is not one of ShareLoRA.
    """
    if config.B != "lora" or config.variant != "hadamard":
        raise ValueError("--share shares the factors of B = lora, without --variant")
    own = {name: getattr(config, name) for name in ("rank", "alpha", "dropout", "A", "C", "D", "E")}
    return ShareLoRAConfig(share=share, **own)


def called(name: str) -> tuple[nn.Module, Tensor]:
    """Call the function of this name ("package.module:function") for a module and its input on the meta device.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--module must be package.module:function, got {name!r}: {error}") from error
    with torch.device("meta"):
        found = make()
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor) and found[1].is_meta):
        raise ValueError(f"{name} must return a module and its input on the meta device, got {type(found).__name__}")
    if found[1].dtype not in TRITON_DTYPES:
        raise ValueError(f"{name}: the input must be float32, float16 or bfloat16, got {found[1].dtype}")
    return found


def plan(traced: Traced) -> dict[str, Plan]:
    """The steps of a call's "forward" and "backward", with the source of each configuration."""
    steps, count, decided = traced
    shown = [_step(step, [one for one in decided if one.before <= i]) for i, step in enumerate(steps)]
    parts = {"forward": range(count), "backward": range(count, len(steps))}
    return {name: _plan(name, [shown[i] for i in part], decided, part) for name, part in parts.items()}


def _plan(name: str, steps: list[Step], decided: Sequence[Decided], part: range) -> Plan:
    slice_ = next((of for part, of in _SLICES.items() if any(part in step.kernel for step in steps)), "glora")
    through = _where(getattr(path_of(slice_, "triton"), name))
    if few := [step for step in steps if _four_bit(step.kernel) == SMALL_M]:
        return Plan(steps, through, "few tokens", few[0].source)
    routes = [one for one in decided if one.what.startswith("route") and part.start <= one.before < part.stop]
    if not routes:
        return Plan(steps, through, "fused", "there is no other")
    route = "library" if any(step.file == "" for step in steps) else "fused"
    return Plan(steps, through, route, routes[0].source)


def _step(step: Launch | CudaLaunch | LibraryProduct, decided: Sequence[Decided]) -> Step:
    """`decided`: the choices made before the step; the last one for its kernel is the step's own."""
    if isinstance(step, LibraryProduct):
        return Step(str(step))
    name = step.kernel if isinstance(step, CudaLaunch) else step.kernel.__name__
    whats = [_four_bit(name)] if _four_bit(name) else [configs.key_of(name), *["dy_mixed"] * (name == "_dy_kernel")]
    chosen = next((one for one in reversed(decided) if one.what in whats), None)
    source = "" if chosen is None else chosen.source
    if isinstance(step, CudaLaunch):
        file = f"csrc/{name.removesuffix('_kernel').removesuffix('_adapted')}.cu"
        return Step(name, file, str(step.grid), f"shared={step.shared}", step.block // 32, source=source)
    features = ["tma"] if any(hasattr(value, "block_shape") for value in step.args.values()) else []
    config = chosen.choice if chosen is not None and isinstance(chosen.choice, dict) else {}
    if config.get("tma") and not features:  # TMA cannot read the strides, so the tile for pointers was taken
        source = "default for pointers"
    elif config.get("persistent"):
        features.append("persistent")
    blocks = " ".join(
        f"{key.removeprefix('BLOCK_')}={value}" for key, value in step.args.items() if key[:6] == "BLOCK_"
    )
    warps, stages = (step.options.get(key, 0) for key in ("num_warps", "num_stages"))
    return Step(
        name, _where(step.kernel.fn), "x".join(map(str, step.grid)), blocks, warps, stages, ", ".join(features),
        source or "default",
    )  # fmt: skip


def _four_bit(kernel: str) -> str:
    """The key in `tables.NAMED` of the 4-bit operation that a kernel performs, or ""."""
    name = kernel.removeprefix("_")
    return next((what for what in (DEQUANTIZE, SMALL_M) if name.startswith(what.removeprefix("4-bit "))), "")


def _where(function: Callable[..., Any]) -> str:
    """The file and line of a function, relative to the folder that holds the package."""
    code = function.__code__
    return f"{os.path.relpath(code.co_filename, Path(glora_kernels.__file__).parent.parent)}:{code.co_firstlineno}"
