"""Which kernels serve one layer: its steps, planned for a card that need not be here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import glora_kernels
from glora_kernels.dispatch.common import path_of
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.four_bit.cuda import CudaLaunch
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, LibraryProduct
from glora_kernels.runtime.sizes import Rows, at
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M
from glora_kernels.tools import planned
from glora_kernels.tools.planned import How, Linear
from glora_kernels.tools.trials import kernel_of


class Step(NamedTuple):
    """One launch of ours, or one product of the vendor's library, which has a name only."""

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
    """The steps of one pass, the file and line that launch them, the route of its large product, what decided it."""

    steps: list[Step]
    through: str
    route: str
    decided_by: str

    @property
    def launches(self) -> int:
        return sum(step.file != "" for step in self.steps)

    def count(self) -> str:
        """How many launches of ours and products of the library."""
        products = len(self.steps) - self.launches
        text = f"{self.launches} launch{'' if self.launches == 1 else 'es'}"
        return text + (f", {products} library product{'' if products == 1 else 's'}" if products else "")


def plan(layer: Linear, how: How) -> dict[str, Plan]:
    """The steps of "forward" and "backward" of a call, with what decided each."""
    config, path = layer.config, path_of("glora", "triton")
    pair, scales = config.variant == "matmul" and config.A == "lora", config.A in ("vector", "constant")
    shape = Shape(how.m, layer.n, layer.k, config.rank if pair or config.B == "lora" else 0)
    found = {}
    for name, steps in planned.linear(layer, how)._asdict().items():
        shown = [_step(step, shape, how) for step in steps]
        route = "library" if any(isinstance(step, LibraryProduct) for step in steps) else "fused"
        what = f"route {'dx' if name == 'backward' else 'fwd'}{' scaled' * scales}"
        decided = tables.explain(what, how.arch, how.dtype, shape)[1]
        if few := [step for step in shown if _four_bit(step.kernel) == SMALL_M]:
            route, decided = "few tokens", few[0].source
        found[name] = Plan(shown, _where(getattr(path, name)), route, decided)
    return found


def _step(step: Launch | CudaLaunch | LibraryProduct, shape: Shape, how: How) -> Step:
    if isinstance(step, LibraryProduct):
        return Step(str(replace(step, left=step.left.new_empty(shape.m, step.left.shape[1]))))
    name = step.kernel if isinstance(step, CudaLaunch) else step.kernel.__name__
    what, source, features = _four_bit(name), "default", []
    if what is not None:
        of = shape if what == SMALL_M else Shape(0, shape.n, shape.k, 0)
        source = tables.explain(what, how.arch, how.dtype, of, among=four_bit.usable(how.route, how.arch))[1]
    if isinstance(step, CudaLaunch):
        file = f"csrc/{name.removesuffix('_kernel').removesuffix('_adapted')}.cu"
        return Step(name, file, str(at(step.grid, shape.m)), f"shared={step.shared}", step.block // 32, source=source)
    args = step.args
    if (tuned := kernel_of(step)) in configs.TUNED:
        config, source = tables.explain(tuned, how.arch, how.dtype, _shape_of(step, shape))
        if config.get("tma") and not args.get("TMA"):  # strides that TMA cannot read: the tile is that of pointers
            source = "default for pointers"
            config = configs.large_product(how.arch, how.dtype, shape.m, shape.n, tma=False)
        features = ["tma"] * bool(args.get("TMA")) + ["persistent"] * bool(config.get("persistent"))
    blocks = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in args.items() if key[:6] == "BLOCK_")
    grid, warps, stages = "x".join(str(at(size, shape.m)) for size in step.grid), *map(step.options.get, _COMPILER)
    return Step(name, _where(step.kernel.fn), grid, blocks, warps or 0, stages or 0, ", ".join(features), source)


_COMPILER = ("num_warps", "num_stages")


def _four_bit(kernel: str) -> str | None:
    """The operation on a 4-bit weight that a kernel serves: a table says whose does."""
    name = kernel.removeprefix("_")
    return next((what for what in (DEQUANTIZE, SMALL_M) if name.startswith(what.removeprefix("4-bit "))), None)


def _shape_of(launch: Launch, call: Shape) -> Shape:
    """The shape a launcher chose its configuration by; what a kernel has no use for is that of the call."""
    args = launch.args
    pair = 0 if args.get("weff_ptr") is not None else args.get("P", 0)
    rank = args["R"] if kernel_of(launch) == "hadamard_grad" else max(pair, args["R"])
    m = args["M"]
    n = call.n if isinstance(m, Rows) else call.k  # Wᵀ·dU of the product variant reads W as its x
    return Shape(configs.m_class(m), args.get("N", n), args.get("K", call.k), rank)


def _where(function: Callable[..., Any]) -> str:
    """The file and line of a function, from the package's folder."""
    code = function.__code__
    return f"{os.path.relpath(code.co_filename, Path(glora_kernels.__file__).parent.parent)}:{code.co_firstlineno}"
