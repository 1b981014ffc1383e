"""Which kernels serve one layer: its steps, planned for a card that need not be here."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import glora_kernels
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.four_bit.cuda import CudaLaunch
from glora_kernels.runtime import configs, cost, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, LibraryProduct
from glora_kernels.runtime.sizes import Rows, at
from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools import planned
from glora_kernels.tools.planned import How, Linear


@dataclass(frozen=True)
class Step:
    """One launch of ours, or one product of the vendor's library."""

    kernel: str
    file: str
    grid: str
    blocks: str
    warps: int
    stages: int
    features: str
    source: str


@dataclass(frozen=True)
class Plan:
    """The steps of one pass, the route of its large product, and what decided it."""

    steps: list[Step]
    route: str
    decided_by: str

    @property
    def launches(self) -> int:
        return sum(step.file != "" for step in self.steps)

    def count(self) -> str:
        """How many launches of ours and products of the library."""
        products = len(self.steps) - self.launches
        parts = [f"{self.launches} launch{'' if self.launches == 1 else 'es'}"]
        if products:
            parts.append(f"{products} library product{'' if products == 1 else 's'}")
        return ", ".join(parts)


def plan(
    sizes: tuple[int, int, int],
    config: GLoRAConfig,
    dtype: torch.dtype,
    arch: str,
    bias: bool,
    quant_type: str | None = None,
    backend: str = "auto",
) -> dict[str, Plan]:
    """The steps of "forward" and "backward" in training: x and every parameter of the adapter want a gradient.

    Args:
        sizes: M, N, K.
        config: of the adapter.
        dtype: of everything.
        arch: the card's architecture.
        bias: whether the base has one.
        quant_type: of a 4-bit base, in blocks of 64 with absmax in fp32; None for a dense one.
        backend: whose kernels serve the 4-bit weight, "auto", "triton" or "cuda".
    """
    m, n, k = sizes
    how = How(m, dtype, arch, route="triton" if quant_type is None else backend)
    both = planned.linear(Linear(config, n, k, bias, quant_type=quant_type or ""), how)
    pair, scales = config.variant == "matmul" and config.A == "lora", config.A in ("vector", "constant")
    shape = Shape(m, n, k, config.rank if pair or config.B == "lora" else 0)
    found = {}
    for name, steps in both._asdict().items():
        shown = [_step(step, shape, dtype, arch, backend) for step in steps]
        route = "library" if any(isinstance(step, LibraryProduct) for step in steps) else "fused"
        measured, source = tables.explain_route(arch, dtype, shape, backward=name == "backward", scales=scales)
        decided = source if measured is not None or arch in cost.CARDS else "default of an unknown card"
        if few := [step for step in shown if _operation(step.kernel) == "small_m"]:
            route, decided = "few tokens", few[0].source
        found[name] = Plan(shown, route, decided)
    return found


def _step(
    step: Launch | CudaLaunch | LibraryProduct, shape: Shape, dtype: torch.dtype, arch: str, backend: str
) -> Step:
    if isinstance(step, LibraryProduct):
        step = replace(step, left=step.left.new_empty(shape.m, step.left.shape[1]))
        return Step(str(step), "", "", "", 0, 0, "", "")
    if isinstance(step, CudaLaunch):
        source = _source(step.kernel, shape, dtype, arch, backend)
        file, warps = step.kernel.removesuffix("_kernel").removesuffix("_adapted"), step.block // 32
        grid = str(at(step.grid, shape.m))
        return Step(step.kernel, f"csrc/{file}.cu", grid, f"shared={step.shared}", warps, 0, "", source)
    name, args = step.kernel.__name__, step.args
    blocks = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in args.items() if key[:6] == "BLOCK_")
    features, source = [], _source(name, shape, dtype, arch, backend)
    tuned = name.removeprefix("_").removeprefix("glora_").removesuffix("_kernel")
    if tuned in configs.TUNED:
        config, source = tables.explain(tuned, arch, dtype, _shape_of(step, shape))
        if args.get("TMA"):
            features += ["tma", *["persistent"] * bool(config["persistent"])]
        elif config.get("tma"):  # strides that TMA cannot read: the tile is that of pointers
            source = "default for pointers"
            config = configs.large_product(arch, dtype, shape.m, shape.n, tma=False)
            features += ["persistent"] * bool(config["persistent"])
    grid = "x".join(str(at(size, shape.m)) for size in step.grid)
    return Step(
        name, _where(step.kernel), grid, blocks, step.options["num_warps"], step.options["num_stages"],
        ", ".join(features), source,
    )  # fmt: skip


def _operation(kernel: str) -> str | None:
    """The operation on a 4-bit weight that a kernel serves: a table says whose does."""
    return next((name for name in tables.FOUR_BIT if kernel.removeprefix("_").startswith(name)), None)


def _source(kernel: str, shape: Shape, dtype: torch.dtype, arch: str, backend: str) -> str:
    """What decided that this kernel serves the 4-bit weight: a table, or "default" as for every other kernel."""
    operation = _operation(kernel)
    if operation is None:
        return "default"
    of = shape if operation == "small_m" else Shape(0, shape.n, shape.k, 0)
    return tables.explain_four_bit(operation, arch, dtype, of, four_bit.usable(backend, arch))[1]


def _shape_of(launch: Launch, call: Shape) -> Shape:
    """The shape a launcher chose its configuration by; what a kernel has no use for is that of the call."""
    args = launch.args
    name = launch.kernel.__name__
    pair = 0 if args.get("weff_ptr") is not None else args.get("P", 0)
    rank = args["R"] if name == "_hadamard_grad_kernel" else max(pair, args["R"])
    m = args["M"]
    n = call.n if isinstance(m, Rows) else call.k  # Wᵀ·dU of the product variant reads W as its x
    return Shape(configs.m_class(m), args.get("N", n), args.get("K", call.k), rank)


def _where(kernel: Any) -> str:
    """The file and line of a kernel, from the package's folder."""
    code = kernel.fn.__code__
    root = Path(glora_kernels.__file__).parent.parent
    return f"{os.path.relpath(code.co_filename, root)}:{code.co_firstlineno}"
