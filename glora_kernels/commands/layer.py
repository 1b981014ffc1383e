"""Which kernels serve one layer: its steps, planned for a card that need not be here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glora_kernels
from glora_kernels.launch import configs, cost, four_bit, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.cuda import CudaLaunch
from glora_kernels.launch.plan import Launch, LibraryProduct, planning
from glora_kernels.ops import triton as path
from glora_kernels.ops.common import Call, Needs, Supports
from glora_kernels.quant import QuantizedWeight, QuantState
from glora_kernels.spec import GLoRAConfig

TUNED_AS = {
    "_glora_fwd_kernel": "fwd", "_glora_dx_kernel": "dx", "_prepare_kernel": "prepare",
    "_added_terms_kernel": "added_terms", "_dy_kernel": "dy", "_x_kernel": "x",
    "_hadamard_grad_kernel": "hadamard_grad",
}  # fmt: skip
"""Under which name a table has a kernel's configurations; the others always take their default."""

OPERATIONS = {
    "_dequantize_kernel": "dequantize", "_dequantize_adapted_kernel": "dequantize", "dequantize_kernel": "dequantize",
    "dequantize_adapted_kernel": "dequantize", "_small_m_kernel": "small_m", "small_m_gemv_kernel": "small_m",
    "small_m_mma_kernel": "small_m",
}  # fmt: skip
"""The operation on a 4-bit weight that a kernel serves: a table says whose does."""

CUDA_FILES = {
    "dequantize_kernel": "csrc/dequantize.cu", "dequantize_adapted_kernel": "csrc/dequantize.cu",
    "small_m_gemv_kernel": "csrc/small_m_gemv.cu", "small_m_mma_kernel": "csrc/small_m_mma.cu",
}  # fmt: skip


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

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    own = {name: meta(*shape) for name, shape in config.parameter_shapes(k, n, bias).items()}
    c = own.pop("C", None), own.pop("C_up", None), own.pop("C_down", None)
    terms: dict[str, Any] = {name.lower(): tensor for name, tensor in own.items()}
    if bias:
        terms["bias"] = meta(n)
    x, dy = meta(m, k), meta(m, n)
    weight = meta(n, k) if quant_type is None else _codes(n, k, quant_type, dtype)
    p = config.dropout if config.B == "lora" else 0.0
    seed = torch.tensor([2**62 + 1]) if p else None
    call = Call(config.scale, p, seed, config.variant == "matmul", "triton" if quant_type is None else backend)
    has_c = c != (None, None, None)

    with planning(arch) as forward:
        if has_c:
            terms["wc"] = path.wc_forward(weight, *c)
        s = Supports(**terms)
        y, h, sigma, u = path.forward(x, weight, s, call)
    needs = Needs(True, *(getattr(s, name) is not None and name != "bias" for name in Supports._fields))
    with planning(arch) as backward:
        grads = path.backward(dy, x, weight, s, y, h, sigma, u, call, needs)
        g = grads[Needs._fields.index("wc")]
        if has_c and g is not None:
            path.wc_backward(g, weight, *c, [tensor is not None for tensor in c])

    pair = config.variant == "matmul" and config.A == "lora"
    shape = Shape(m, n, k, config.rank if pair or config.B == "lora" else 0)
    found = {}
    for name, steps in (("forward", forward), ("backward", backward)):
        planned = [_step(step, shape, dtype, arch, backend) for step in steps]
        route = "library" if any(isinstance(step, LibraryProduct) for step in steps) else "fused"
        measured, source = tables.explain_route(arch, dtype, shape, backward=name == "backward", scales=s.a is not None)
        decided = source if measured is not None or arch in cost.CARDS else "default of an unknown card"
        if few := [step for step in planned if OPERATIONS.get(step.kernel) == "small_m"]:
            route, decided = "few tokens", few[0].source
        found[name] = Plan(planned, route, decided)
    return found


def _codes(n: int, k: int, quant_type: str, dtype: torch.dtype) -> QuantizedWeight:
    """A 4-bit weight without values."""
    packed = torch.empty(-(-n * k // 2), 1, dtype=torch.uint8, device="meta")
    absmax = torch.empty(-(-n * k // 64), dtype=torch.float32, device="meta")
    return QuantizedWeight(packed, QuantState(absmax, quant_type, 64, (n, k), dtype))


def _step(
    step: Launch | CudaLaunch | LibraryProduct, shape: Shape, dtype: torch.dtype, arch: str, backend: str
) -> Step:
    if isinstance(step, LibraryProduct):
        return Step(str(step), "", "", "", 0, 0, "", "")
    if isinstance(step, CudaLaunch):
        source = _source(step.kernel, shape, dtype, arch, backend)
        file, warps = CUDA_FILES[step.kernel], step.block // 32
        return Step(step.kernel, file, str(step.grid), f"shared={step.shared}", warps, 0, "", source)
    name, args = step.kernel.__name__, step.args
    blocks = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in args.items() if key[:6] == "BLOCK_")
    features, source = [], _source(name, shape, dtype, arch, backend)
    if name in TUNED_AS:
        config, source = tables.explain(TUNED_AS[name], arch, dtype, _shape_of(step, shape))
        if args.get("TMA"):
            features += ["tma", *["persistent"] * bool(config["persistent"])]
            features += ["warp-specialized"] * bool(args.get("WARP_SPECIALIZE"))
        elif config.get("tma"):  # strides that TMA cannot read: the tile is that of pointers
            source = "default for pointers"
            config = configs.large_product(arch, dtype, shape.m, shape.n, tma=False)
            features += ["persistent"] * bool(config["persistent"])
    grid = "x".join(map(str, step.grid))
    return Step(
        name, _where(step.kernel), grid, blocks, step.options["num_warps"], step.options["num_stages"],
        ", ".join(features), source,
    )  # fmt: skip


def _source(kernel: str, shape: Shape, dtype: torch.dtype, arch: str, backend: str) -> str:
    """What decided that this kernel serves the 4-bit weight: a table, or "default" as for every other kernel."""
    operation = OPERATIONS.get(kernel)
    if operation is None:
        return "default"
    of = shape if operation == "small_m" else Shape(0, shape.n, shape.k, 0)
    return tables.explain_four_bit(operation, arch, dtype, of, four_bit.usable(backend, arch))[1]


def _shape_of(launch: Launch, call: Shape) -> Shape:
    """The shape a launcher chose its configuration by; what a kernel has no use for is that of the call."""
    args = launch.args
    name = launch.kernel.__name__
    pair = args.get("P", 0) if name != "_prepare_kernel" or args["HAS_P"] else 0
    rank = args["R"] if name == "_hadamard_grad_kernel" else max(pair, args["R"])
    m = args["M"]
    n = call.n if m == call.m else call.k  # Wᵀ·dU of the product variant reads W as its x
    return Shape(m, args.get("N", n), args.get("K", call.k), rank)


def _where(kernel: Any) -> str:
    """The file and line of a kernel, from the package's folder."""
    code = kernel.fn.__code__
    root = Path(glora_kernels.__file__).parent.parent
    return f"{os.path.relpath(code.co_filename, root)}:{code.co_firstlineno}"
