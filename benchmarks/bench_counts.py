"""What is counted or compared, not timed: matrix products, memory kept for backward, and what survives in 16 bits.

Products are counted as GEMM-equivalents of 2·M·N·K. Every operator is intercepted below autograd by a
TorchDispatchMode, and its products are computed from its name and the shapes of its arguments: a profiler
looks up a formula by the operator's exact name and finds none for in-place forms (`addmm_`, `baddbmm_`), so
it counts as zero what those compute. An operator whose name says that it multiplies matrices and that is not
in the table here is an error, not a zero. Of our registered operators the operations inside are counted.

Small adapters: w·(1 + A) rounded to 16 bits is w again where A is small, so a dense W_eff in the base's dtype loses the
adapter while the error of y stays small: it must be looked at by itself. With Δ the contribution in float64
on the same 16-bit inputs and y_base the frozen layer in that dtype, two figures for y (and likewise for dx):

    error = ‖(y - y_base) - Δ‖ / ‖Δ‖          share = <y - y_base, Δ> / <Δ, Δ>

share is 1 where the contribution arrives whole, on average, and 0 where it is lost. The result itself is rounded to 16
bits, which nothing avoids: `floor` is the error of round(y_true) - round(y_base_true), to be read beside `error`.
Entries of an adapter are N(0, size²), in the low-rank forms those of the product up·down; a constant is the size.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure, peers, problems
from benchmarks.cases import LLAMA, Entry
from benchmarks.devices import progress
from benchmarks.measure import Bench
from benchmarks.problems import Contestant, Problem
from glora_kernels import GLoRAConfig, backend, reference
from glora_kernels.reference import cases as known
from glora_kernels.reference.cases import case_of
from glora_kernels.spec import CHOICES
from glora_kernels.tools import planned

SHAPE = Entry("frozen", "ours", m=256, n=512, k=512, r=8, bias=True, dtype="fp32")
FORMS = {"A": ("vector", "constant", "lora"), "B": ("lora", "vector")}
SIZES = {"A": (1e-3, 3e-3, 1e-2), "B": (1e-3, 1e-2)}
_SOUNDS_LIKE_A_PRODUCT = re.compile(r"(mm|mv|matmul|linear|addr|ger|dot|einsum|tensordot|attention|conv\w*)_?$")
_NOT_A_PRODUCT = re.compile(r"(upsample|to_dense|linalg_vector_norm)")


def _two(i: int, j: int) -> Callable[[tuple[Any, ...]], int]:
    """2 x (elements of argument i) x (last size of argument j): a product of matrices, batched or not."""
    return lambda args: 2 * args[i].numel() * args[j].shape[-1]


FLOPS: dict[str, Callable[[tuple[Any, ...]], int]] = {
    **dict.fromkeys(("mm", "bmm", "_scaled_mm"), _two(0, 1)),
    **dict.fromkeys(("addmm", "_addmm_activation", "baddbmm", "addbmm"), _two(1, 2)),
    **dict.fromkeys(("mv", "dot", "vdot", "linalg_vecdot"), lambda args: 2 * args[0].numel()),
    **dict.fromkeys(("linear", "mkldnn_linear", "_mkldnn_linear"), lambda args: 2 * args[0].numel() * args[1].shape[0]),
    "matmul": lambda args: 2 * args[0].numel() * (args[1].shape[-1] if args[1].ndim > 1 else 1),
    "addmv": lambda args: 2 * args[1].numel(),
    "addr": lambda args: 2 * args[1].numel() * args[2].numel(),
}
"""Operations from the arguments, by the operator's name without overload and trailing underscore."""


class ProductCounter(TorchDispatchMode):
    """Counts the operations of every matrix product that runs inside, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "glora_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        plain = func.overloadpacket.__name__.rstrip("_")
        if plain in FLOPS:
            self.flops[plain] += FLOPS[plain](args)
        elif func.namespace == "aten" and _SOUNDS_LIKE_A_PRODUCT.search(plain) and not _NOT_A_PRODUCT.search(plain):
            raise NotImplementedError(f"{func}: no count of its operations; add it to FLOPS")
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return sum(self.flops.values())


class OperationCounter(TorchDispatchMode):
    """Counts the operations that run inside and make no view: on a card each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Saved:
    """One tensor autograd keeps: its shape, the bytes of its storage, and whose storage it is.

    kind: "x", "y", "parameter", or "other" (memory that exists for backward only). A storage saved twice has
    its bytes counted at its first appearance.
    """

    shape: tuple[int, ...]
    bytes: int
    kind: str


def gemm_equivalents(contestant: Contestant, problem: Problem) -> float:
    """Products of one forward and backward over 2·M·N·K."""
    with ProductCounter() as counter:
        problems.gradients(contestant, problem.x, problem.dy)
    entry = problem.entry
    return counter.total() / (2 * entry.m * entry.n * entry.k)


def saved_tensors(contestant: Contestant, problem: Problem) -> list[Saved]:
    """What autograd keeps between forward and backward."""
    y, packed = measure.saved_tensors(lambda: contestant.forward(problem.x))
    owners = {_storage(problem.x): "x", _storage(y): "y", _storage(problem.weight): "parameter"}
    values = [problem.bias, *problem.params.values(), *contestant.params.values()]
    owners |= {_storage(value): "parameter" for value in values if value is not None}
    found, seen = [], set()
    for tensor in packed:
        storage = _storage(tensor)
        size = 0 if storage in seen else tensor.untyped_storage().nbytes()
        seen.add(storage)
        found.append(Saved(tuple(tensor.shape), size, owners.get(storage, "other")))
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def bytes_of(saved: list[Saved], kind: str) -> int:
    return sum(tensor.bytes for tensor in saved if tensor.kind == kind)


def limit(config: GLoRAConfig) -> float:
    """The most GEMM-equivalents a configuration may take at M=256, K=N=512, R=8."""
    if config.A != "lora":
        return 2.15
    return 2.3 if config.variant == "matmul" else 3.3


def configurations(rank: int) -> list[GLoRAConfig]:
    """Every pair of A and B in both variants with C, D, E absent, and a full one."""
    pairs = itertools.product(CHOICES["A"], CHOICES["B"])
    rest = ("none", "none", "none")
    found = [GLoRAConfig.of((a, b, *rest), rank=rank) for a, b in pairs]
    found += [GLoRAConfig.of(("lora", b, *rest), rank=rank, variant="matmul") for b in CHOICES["B"]]
    return [*found, GLoRAConfig("vector", "lora", "vector", "vector", "vector", rank)]


def products(entry: Entry = SHAPE) -> dict[str, Any]:
    """Products and saved bytes of every configuration, ours beside PEFT's where it has a layer."""
    rows = []
    for config in progress(configurations(entry.r or 1), "products"):
        problem = problems.make_problem(entry, config=config)
        for impl, build in {"ours": peers.ours, "peft": peers.peft}.items():
            try:
                contestant = build(problem)
            except (ImportError, peers.Unavailable):
                continue
            problems.check(contestant, problem)
            saved = saved_tensors(contestant, problem)
            row: dict[str, Any] = {"case": case_of(config), "impl": impl}
            row |= {"gemms": gemm_equivalents(contestant, problem), "saved_bytes": bytes_of(saved, "other")}
            row |= {f"keeps_{kind}": any(tensor.kind == kind for tensor in saved) for kind in "xy"}
            row["largest"] = max((math.prod(t.shape) for t in saved if t.kind == "other"), default=0)
            rows.append(row | {"limit": limit(config) if impl == "ours" else None})
    shape = f"M={entry.m} K={entry.k} N={entry.n} R={entry.r} {entry.dtype}"
    return {"shape": shape, "rows": rows}


@dataclass(frozen=True)
class Survival:
    """How one tensor (y or dx) carries the contribution: relative error, surviving share."""

    error: float
    share: float

    @classmethod
    def of(cls, value: Tensor, base: Tensor, delta: Tensor) -> Survival:
        arrived = value.double() - base.double()
        share = float((arrived * delta).sum() / (delta * delta).sum())
        return cls(float((arrived - delta).norm() / delta.norm()), share)


def small_problem(support: str, form: str, size: float, entry: Entry, device: str = "cpu") -> Problem:
    """A layer with one support of the given form, whose entries have the given size."""
    forms, r = [form if name == support else "none" for name in "ABCDE"], entry.r or 1
    base = problems.make_problem(entry, device, GLoRAConfig.of(forms, rank=r))
    scale = {support: size, f"{support}_up": r**-0.5, f"{support}_down": size}  # of up·down: r times the variance
    params = {}
    for name, value in base.params.items():
        entries = torch.ones_like(value) if form == "constant" else value.double() / problems.STD
        params[name] = (entries * scale[name]).to(value.dtype)
    return replace(base, params=params)


def survival(case: Problem, contestant: Contestant) -> dict[str, Survival]:
    """The figures of one contestant, of "y" and of "dx"."""
    y, found = problems.gradients(contestant, case.x, case.dy)
    with torch.no_grad():
        base_y, base_dx = case.x @ case.weight.t(), case.dy @ case.weight
    delta_y, delta_dx, *_ = _contribution(case)
    return {"y": Survival.of(y.detach(), base_y, delta_y), "dx": Survival.of(found["x"], base_dx, delta_dx)}


def survival_floor(case: Problem) -> dict[str, Survival]:
    """The figures of the exact result rounded to the dtype: no 16-bit output can have a smaller error."""
    delta_y, delta_dx, base_y, base_dx = _contribution(case)
    dtype = case.weight.dtype
    return {
        "y": Survival.of((base_y + delta_y).to(dtype), base_y.to(dtype), delta_y),
        "dx": Survival.of((base_dx + delta_dx).to(dtype), base_dx.to(dtype), delta_dx),
    }


def _contribution(case: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Δ of y and of dx, and y_base and dx_base, in float64."""
    x, dy, weight = case.x.detach().double(), case.dy.double(), case.weight.double()
    params = {name: value.double() for name, value in case.params.items()}
    added = reference.effective_weight(weight, params, case.config) - weight
    return x @ added.t(), dy @ added, x @ weight.t(), dy @ weight


def small_adapters(device: str = "cpu", features: int = 512) -> dict[str, Any]:
    """A row for each dtype, support, form, size and tensor, at M = K = N = `features`: ours, the plain W_eff in the
    same dtype, and the floor."""
    rows = []
    todo = [(d, s, form, size) for d in ("bf16", "fp16") for s in "AB" for form in FORMS[s] for size in SIZES[s]]
    for dtype, support, form, size in progress(todo, "small adapters"):
        entry = Entry("frozen", "ours", features, features, features, 8, dtype=dtype)
        case = small_problem(support, form, size, entry, device)
        with backend("eager" if device == "cpu" else "auto"):
            found = {"ours": survival(case, peers.ours(case)), "plain": survival(case, peers.eager(case))}
        found["floor"] = survival_floor(case)
        for tensor in ("y", "dx"):
            row: dict[str, Any] = {"dtype": dtype, "support": f"{support} {form}", "size": size, "tensor": tensor}
            row |= {f"{way}_share": found[way][tensor].share for way in ("ours", "plain")}
            rows.append(row | {f"{way}_error": of[tensor].error for way, of in found.items()})
    return {"shape": f"M=K=N={features} R=8", "backend": "eager" if device == "cpu" else "auto", "rows": rows}


def launches(arch: str = "sm_90", m: int = 8192) -> dict[str, Any]:
    """What the seven linears of a LLaMA-3-8B layer launch forward in training: frozen; ours, planned for a card, with
    q/k/v and gate/up fused; PEFT's LoRA, one operation after the other, whatever the sizes."""
    how, config = planned.How(m, torch.bfloat16, arch), known.LORA
    linears = {name: planned.Linear(config, *size) for name, size in LLAMA.items()}
    sets = {
        "/".join(names): len(planned.group([linears[name] for name in names], how).forward)
        for names in known.SIBLINGS.values()
    }
    sets |= {name: len(planned.linear(linears[name], how).forward) for name in ("o", "down")}
    rows = {"frozen": len(LLAMA), "ours": sum(sets.values())}
    problem = problems.make_problem(replace(SHAPE, bias=False), config=config)
    with contextlib.suppress(ImportError):
        theirs = peers.peft(problem)
        with OperationCounter() as counter:
            theirs.forward(problem.x)
        rows["peft"] = len(LLAMA) * counter.count
    return {"arch": arch, "m": m, "sets": sets, "rows": rows}


def test_products(bench: Bench) -> None:
    bench.note("products", products)


def test_launches(bench: Bench) -> None:
    bench.note("launches", launches)


def test_small_adapters(bench: Bench) -> None:
    bench.note("small_adapters", lambda: small_adapters(bench.device.kind))
