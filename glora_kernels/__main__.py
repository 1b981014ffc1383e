"""`python -m glora_kernels info` and `check`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m glora_kernels",
        description="GLoRA and LoRA layers at the cost of a frozen linear layer.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, what was built, which route each kind of layer takes")
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    check = commands.add_parser("check", help="test every kernel on this machine against the oracle (about a minute)")
    check.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: the GPU where there is one; on a CPU the Triton kernels run in Triton's interpreter",
    )  # fmt: skip
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    return _info(args.json) if args.command == "info" else _check(args.device, args.json)


def _info(as_json: bool) -> int:
    facts: dict[str, Any] = {"versions": _versions(), "devices": _devices(), "built": _built()}
    facts |= {"routes": _routes(), "layers": _layers()}
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    print(_table(["package", "version"], list(facts["versions"].items())))
    print(_table(["device", "what it is"], [(d["name"], d["about"]) for d in facts["devices"]]))
    print(_table(["part", "state"], list(facts["built"].items())))
    for rows in (facts["routes"], facts["layers"]):
        print(_table(list(rows[0]), [list(row.values()) for row in rows]))
    print("products: those of the size of W in one forward and backward; a frozen linear layer has 2.")
    return 0


def _check(device: str, as_json: bool) -> int:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda was asked for, but PyTorch sees no GPU", file=sys.stderr)
        return 2
    from glora_kernels import selftest
    from glora_kernels.launch import environment

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device == "cpu" and environment.has_triton() and not environment.interpreting():
        # Triton reads this when it is imported, which has happened: start again with it.
        command = [sys.executable, "-m", "glora_kernels", "check", "--device", "cpu", *(["--json"] if as_json else [])]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode

    half = [torch.float32, torch.float16, torch.bfloat16]
    plans = [("eager", [torch.float64, *half])]
    if environment.has_triton():
        plans.append(("triton", half))
    else:
        print("the triton package is not installed: its kernels are not checked", file=sys.stderr)
    start, rows = time.perf_counter(), []
    for route, dtypes in plans:

        def progress(done: int, total: int, route: str = route) -> None:
            if sys.stderr.isatty():
                print(
                    f"\r{route}: {done}/{total}",
                    end="\n" if done == total else "",
                    file=sys.stderr,
                    flush=True,
                )

        rows += selftest.run(device, route, dtypes, progress)
    failed = [row for row in rows if not row.passed]
    if as_json:
        print(json.dumps([vars(row) | {"passed": row.passed} for row in rows], indent=1))
    else:
        columns = ["route", "dtype", "result", "kernel", "cases", "error", "allowed", "ok"]
        cells = [
            (r.route, r.dtype, r.result, r.kernel, r.cases, f"{r.error:.1e}", f"{r.allowed:.1e}", _verdict(r))
            for r in rows
        ]
        print(_table(columns, cells))
        how = "in Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
        print("error and allowed (twice plain PyTorch's at this dtype, plus a floor) are those of the worst case.")
        print(
            f"{len(rows) - len(failed)} of {len(rows)} results within their tolerance on {device} ({how}), "
            f"{sum(r.cases for r in rows)} comparisons in {time.perf_counter() - start:.0f} s"
        )
    return 1 if failed else 0


def _verdict(row: Any) -> str:
    return "yes" if row.passed else f"NO: {row.case}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "glora_kernels",
        "torch",
        "triton",
        "safetensors",
        "peft",
        "transformers",
        "bitsandbytes",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> list[dict[str, str]]:
    import torch

    from glora_kernels.launch import environment

    found = [{"name": "cpu", "about": f"{platform.machine()}, {torch.get_num_threads()} threads"}]
    found += [{"name": f"cuda:{i}", "about": about} for i, about in enumerate(environment.gpus())]
    if len(found) == 1:
        found.append({"name": "cuda", "about": "none: PyTorch sees no GPU"})
    return found


def _built() -> dict[str, str]:
    from glora_kernels.launch import environment, routes

    interpreter = "on (TRITON_INTERPRET=1)" if environment.interpreting() else "off"
    state = "compiled at the first call on a GPU" if environment.has_triton() else "unavailable: no triton package"
    return {
        "Triton kernels": state,
        "Triton interpreter": interpreter,
        "CUDA extension": "not part of this version; no layer needs it",
        "backend": routes.current_backend(),
    }


def _routes() -> list[dict[str, str]]:
    """Which path "auto" takes on each device, and why; a GPU is listed where there is none, as what would be."""
    import torch

    from glora_kernels.launch import routes

    rows = []
    for device in ("cpu", "cuda"):
        here = device == "cpu" or torch.cuda.is_available()
        for dtypes in ((torch.float32, torch.float16, torch.bfloat16), (torch.float64,)):
            route, why = routes.explain(device, dtypes[0])
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            rows.append({"device": device if here else f"{device} (none here)", "dtype": names,
                         "route": route, "why": why})  # fmt: skip
    return rows


def _layers() -> list[dict[str, str]]:
    """What a forward and backward of each kind of layer does: GEMM-sized products, and with which kernels on a GPU."""
    thin = "_project_kernel, _factor_grad_kernel"
    large = "_glora_fwd_kernel, _glora_dx_kernel"
    rows = (
        ("LoRA, A none", "2", "low-rank and bias terms added to the product", f"{large}, {thin}"),
        ("A vector or constant", "2", "rows scaled after the product; dA recovered from y",
         f"{large}, {thin}, _hadamard_grad_kernel (rows that y does not give)"),
        ("A lora", "3", "W_eff in one reused workspace, rebuilt in backward",
         f"_weff_kernel, {large}, {thin}, _hadamard_grad_kernel"),
        ("A lora, product variant", "2", "LoRA with W·A_up in the place of B_up", f"{large}, {thin}"),
        ("C, D or E", "+0", "one vector a forward, W read once more for C", "_beta_kernel, _project_kernel (Wᵀg)"),
    )  # fmt: skip
    return [dict(zip(("layer", "products", "how", "kernels on a GPU"), row, strict=True)) for row in rows]


def _table(head: list[str], rows: list[Any]) -> str:
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
