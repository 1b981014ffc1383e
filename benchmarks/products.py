"""Matrix products of one forward and backward, and the memory kept between them.

    python -m benchmarks.products

Products are counted as GEMM-equivalents of 2·M·N·K. Every operator is intercepted below autograd by a
TorchDispatchMode, and its products are computed from its name and the shapes of its arguments: a profiler
looks up a formula by the operator's exact name and finds none for in-place forms (`addmm_`, `baddbmm_`), so
it counts as zero what those compute. An operator whose name says that it multiplies matrices and that is not
in the table here is an error, not a zero. Of our registered operators the operations inside are counted.

Memory is what autograd saves, seen through `saved_tensors_hooks`: the storages kept alive, each once, except
those of the parameters (which exist anyway) and of x; y is the layer's output and is reported apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cases
from benchmarks.cases import Contestant, Problem, Shape
from benchmarks.timing import progress, table
from glora_kernels import GLoRAConfig
from glora_kernels.spec import CHOICES
from glora_kernels.tools import outputs

SHAPE = Shape(m=256, k=512, n=512, r=8)
_SOUNDS_LIKE_A_PRODUCT = re.compile(r"(mm|mv|matmul|linear|addr|ger|dot|einsum|tensordot|attention|conv\w*)_?$")
_NOT_A_PRODUCT = re.compile(r"(upsample|to_dense|linalg_vector_norm)")


def _two(i: int, j: int) -> Callable[[tuple[Any, ...]], int]:
    """2 x (elements of argument i) x (last size of argument j): a product of matrices, batched or not."""
    return lambda args: 2 * args[i].numel() * args[j].shape[-1]


FLOPS: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "mm": _two(0, 1),
    "bmm": _two(0, 1),
    "matmul": lambda args: 2 * args[0].numel() * (args[1].shape[-1] if args[1].ndim > 1 else 1),
    "addmm": _two(1, 2),
    "_addmm_activation": _two(1, 2),
    "baddbmm": _two(1, 2),
    "addbmm": _two(1, 2),
    "_scaled_mm": _two(0, 1),
    "mv": lambda args: 2 * args[0].numel(),
    "addmv": lambda args: 2 * args[1].numel(),
    "dot": lambda args: 2 * args[0].numel(),
    "vdot": lambda args: 2 * args[0].numel(),
    "linalg_vecdot": lambda args: 2 * args[0].numel(),
    "addr": lambda args: 2 * args[1].numel() * args[2].numel(),
    "linear": lambda args: 2 * args[0].numel() * args[1].shape[0],
    "mkldnn_linear": lambda args: 2 * args[0].numel() * args[1].shape[0],
    "_mkldnn_linear": lambda args: 2 * args[0].numel() * args[1].shape[0],
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
        name = func.overloadpacket.__name__
        plain = name.rstrip("_")
        if plain in FLOPS:
            self.flops[plain] += FLOPS[plain](args)
        elif func.namespace == "aten" and _SOUNDS_LIKE_A_PRODUCT.search(plain) and not _NOT_A_PRODUCT.search(plain):
            raise NotImplementedError(f"{func}: no count of its operations; add it to FLOPS")
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return sum(self.flops.values())


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
        cases.step(contestant, problem.x, problem.dy)
    shape = problem.shape
    return counter.total() / (2 * shape.m * shape.n * shape.k)


def saved_tensors(contestant: Contestant, problem: Problem) -> list[Saved]:
    """What autograd keeps between forward and backward."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = contestant.forward(problem.x)
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


def measure(shape: Shape = SHAPE) -> dict[str, Any]:
    """Products and saved bytes of every configuration, ours beside PEFT's where it has a layer."""
    rows = []
    for config in progress(configurations(shape.r), "products"):
        problem = cases.make_problem(shape, config)
        mine = cases.ours(problem)
        cases.check(mine, problem)
        row = {"case": cases.config_case(config), "impl": "ours"}
        rows.append(row | _figures(mine, problem) | {"limit": limit(config)})
        try:
            peer = cases.peft(problem)
        except (ImportError, ValueError):
            continue
        cases.check(peer, problem)
        rows.append(row | {"impl": "peft"} | _figures(peer, problem) | {"limit": None})
    return {"shape": str(shape), "rows": rows, "unavailable": cases.unavailable()}


def _figures(contestant: Contestant, problem: Problem) -> dict[str, Any]:
    saved = saved_tensors(contestant, problem)
    return {
        "gemms": gemm_equivalents(contestant, problem),
        "saved_bytes": bytes_of(saved, "other"),
        "keeps_x": any(tensor.kind == "x" for tensor in saved),
        "keeps_y": any(tensor.kind == "y" for tensor in saved),
        "largest": max((math.prod(t.shape) for t in saved if t.kind == "other"), default=0),
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def show(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    columns = ("case", "impl", "gemms", "limit", "saved_bytes", "keeps_x", "keeps_y")
    rows = [{name: row[name] for name in columns} for row in result["rows"]]
    for row in rows:
        row["limit"] = None if row["limit"] is None else f"≤ {row['limit']:.2f}"
        row |= {name: "yes" if row[name] else "no" for name in ("keeps_x", "keeps_y")}
    return f"{result['shape']}, forward and backward; saved_bytes beyond x, y and the parameters\n\n" + table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=outputs.file, metavar="PATH", help="write the figures as JSON")
    args = parser.parse_args()
    result = measure()
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
