"""What of a small adapter's contribution survives in 16 bits.

    python -m benchmarks.small_adapters --dtype bf16

w·(1 + A) rounded to 16 bits is w again where A is small, so a dense W_eff in the base's dtype loses the
adapter while the error of y stays small: it must be looked at by itself. With Δ the contribution in float64
on the same 16-bit inputs and y_base the frozen layer in that dtype, two figures for y (and likewise for dx):

    error = ‖(y - y_base) - Δ‖ / ‖Δ‖          share = <y - y_base, Δ> / <Δ, Δ>

share is 1 where the contribution arrives whole, on average, and 0 where it is lost. The result itself is
rounded to 16 bits, which nothing avoids: `floor` is the error of round(y_true) - round(y_base_true), to be
read beside `error`. Three ways are compared: ours, the plain W_eff in the same dtype, and that floor.

W ~ N(0, 1/K), no bias. Adapter entries are N(0, size²), in the low-rank forms those of the product up·down; a
constant is the size itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Contestant, Problem, Shape
from benchmarks.timing import progress, table
from glora_kernels import GLoRAConfig, backend, reference
from glora_kernels.tools import outputs

SIZES_A, SIZES_B = (1e-3, 3e-3, 1e-2), (1e-3, 1e-2)
FORMS_A, FORMS_B = ("vector", "constant", "lora"), ("lora", "vector")
WAYS = ("ours", "plain")


@dataclass(frozen=True)
class Survival:
    """How one tensor (y or dx) carries the contribution: relative error, surviving share."""

    error: float
    share: float


def problem(support: str, form: str, size: float, shape: Shape) -> Problem:
    """A layer with one support of the given form, whose entries have the given size."""
    forms = dict.fromkeys("ABCDE", "none") | {support: form}
    base = cases.make_problem(shape, GLoRAConfig(**forms, rank=shape.r), bias=False)  # type: ignore[arg-type]
    params = {name: (value.double() / cases.STD).to(shape.dtype) for name, value in base.params.items()}
    if form == "lora":  # entries of up·down have r times the variance of a product of two
        scale = {f"{support}_up": shape.r**-0.5, f"{support}_down": size}
        params = {name: (value.double() * scale[name]).to(shape.dtype) for name, value in params.items()}
    elif form == "constant":
        params = {support: torch.full_like(params[support], size)}
    else:
        params = {support: (params[support].double() * size).to(shape.dtype)}
    return Problem(shape, base.config, base.x, base.dy, base.weight, None, params)


def survival(case: Problem, contestant: Contestant) -> dict[str, Survival]:
    """The figures of one contestant, of "y" and of "dx"."""
    y = cases.step(contestant, case.x, case.dy).detach()
    with torch.no_grad():
        base_y, base_dx = case.x @ case.weight.t(), case.dy @ case.weight
    delta_y, delta_dx, *_ = _contribution(case)
    assert case.x.grad is not None
    return {"y": _compare(y, base_y, delta_y), "dx": _compare(case.x.grad, base_dx, delta_dx)}


def floor(case: Problem) -> dict[str, Survival]:
    """The figures of the exact result rounded to the dtype: no 16-bit output can have a smaller error."""
    delta_y, delta_dx, base_y, base_dx = _contribution(case)
    dtype = case.shape.dtype
    return {
        "y": _compare((base_y + delta_y).to(dtype), base_y.to(dtype), delta_y),
        "dx": _compare((base_dx + delta_dx).to(dtype), base_dx.to(dtype), delta_dx),
    }


def ways(case: Problem) -> dict[str, Contestant]:
    """Ours and the plain W_eff, in the problem's dtype."""
    return {"ours": cases.ours(case), "plain": cases.eager(case)}


def selection() -> Iterator[tuple[str, str, float]]:
    """(support, form, size) of every row."""
    yield from (("A", form, size) for form in FORMS_A for size in SIZES_A)
    yield from (("B", form, size) for form in FORMS_B for size in SIZES_B)


def measure(dtypes: tuple[str, ...] = ("bf16", "fp16"), features: int = 512) -> dict[str, Any]:
    """One row for each support, form, size, dtype and tensor, at M = K = N = `features`."""
    rows = []
    todo = [(dtype, *row) for dtype in dtypes for row in selection()]
    for dtype, support, form, size in progress(todo, "small adapters"):
        case = problem(support, form, size, Shape(features, features, features, 8, cases.DTYPES[dtype]))
        with backend("eager"):
            found = {way: survival(case, contestant) for way, contestant in ways(case).items()}
        found["floor"] = floor(case)
        for tensor in ("y", "dx"):
            row: dict[str, Any] = {"dtype": dtype, "support": f"{support} {form}", "size": size}
            row["tensor"] = tensor
            row |= {f"{way}_share": found[way][tensor].share for way in WAYS}
            row |= {f"{way}_error": found[way][tensor].error for way in (*WAYS, "floor")}
            rows.append(row)
    return {"shape": f"M=K=N={features} R=8", "backend": "eager", "rows": rows}


def _contribution(case: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Δ of y and of dx, and y_base and dx_base, in float64."""
    x, dy, weight = case.x.detach().double(), case.dy.double(), case.weight.double()
    params = {name: value.double() for name, value in case.params.items()}
    added = reference.effective_weight(weight, params, case.config) - weight
    return x @ added.t(), dy @ added, x @ weight.t(), dy @ weight


def _compare(value: Tensor, base: Tensor, delta: Tensor) -> Survival:
    arrived = value.double() - base.double()
    share = float((arrived * delta).sum() / (delta * delta).sum())
    return Survival(float((arrived - delta).norm() / delta.norm()), share)


def show(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [row | {"size": f"{row['size']:.0e}"} for row in result["rows"]]
    return f"{result['shape']}, backend {result['backend']}; share 1 is whole, 0 is lost\n\n" + table(rows)


def plot(result: dict[str, Any], path: Path, dtype: str = "bf16") -> None:
    """The surviving share in y against |A|, ours and the plain W_eff, one panel a form of A."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(FORMS_A), sharey=True)
    for axes, form in zip(panels, FORMS_A, strict=True):
        rows = [r for r in result["rows"] if (r["dtype"], r["support"], r["tensor"]) == (dtype, f"A {form}", "y")]
        sizes = [row["size"] for row in rows]
        axes.plot(sizes, [row["ours_share"] for row in rows], "o-", color="#2a6f97", label="ours")
        axes.plot(sizes, [row["plain_share"] for row in rows], "s--", color="#bc6c25", label=f"{dtype} W_eff")
        axes.axhline(1.0, color="black", linewidth=0.6)
        axes.set_xscale("log")
        axes.set_title(f"A = {form}", fontsize=10)
        axes.set_xlabel("|A|")
    panels[0].set_ylabel(f"share of Δ in y, {dtype}")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="only this one (default: both)")
    parser.add_argument("--json", type=outputs.file, metavar="PATH", help="write the figures as JSON")
    args = parser.parse_args()
    result = measure((args.dtype,) if args.dtype else ("bf16", "fp16"))
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
