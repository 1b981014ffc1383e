"""`python -m glora_kernels info`: this machine and installation, or with --layer the kernels that serve one layer."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from typing import Any

from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools.commands import text

HELP = "versions, devices, tables and routes; with --layer, which kernels serve a layer, and how they are launched"
PACKAGES = ("glora_kernels", "torch", "triton", "safetensors", "peft", "transformers", "bitsandbytes")
DTYPES = ("bf16", "fp16", "fp32")
QUANT_TYPES = ("nf4", "fp4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--layer", type=text.sizes, metavar="MxNxK",
        help="tokens x out_features x in_features: print the steps of this layer's forward and backward",
    )  # fmt: skip
    text.add_case(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the layer and its input (default: bf16)")
    parser.add_argument("--four-bit", choices=QUANT_TYPES, help="with --layer: the base is held in 4 bits")
    parser.add_argument(
        "--backend", choices=("auto", "triton", "cuda"), default="auto",
        help="with --four-bit: whose kernels serve the 4-bit weight (default: those that are measured or expected to)",
    )  # fmt: skip
    parser.add_argument(
        "--arch", type=text.architecture, help="the card's, like sm_90 (default: this GPU's, else sm_90)"
    )


def run(args: argparse.Namespace) -> int:
    if args.layer is not None:
        return _layer(args)
    facts: dict[str, Any] = {"versions": _versions(), "devices": _devices(), "built": _built(), "tables": _tables()}
    facts |= {"routes": _routes(), "layers": _layers()}
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(text.table(["package", "version"], list(facts["versions"].items())))
    print(text.table(["device", "what it is"], [(d["name"], d["about"]) for d in facts["devices"]]))
    print(text.table(["part", "state"], list(facts["built"].items())))
    for rows in (facts["tables"], facts["routes"], facts["layers"]):
        print(text.table(list(rows[0]), [list(row.values()) for row in rows]))
    print("products: those of the size of W in one forward and backward; a frozen linear layer has 2.")
    print("The kernels of one layer, in order and with their configurations: info --layer MxNxK --case ...")
    return 0


def _layer(args: argparse.Namespace) -> int:
    from glora_kernels.runtime import environment

    if not environment.has_triton():
        print("info --layer plans Triton launches, and the triton package is not installed", file=sys.stderr)
        return 2
    import torch

    from glora_kernels.runtime.tables import DTYPES as BY_NAME
    from glora_kernels.tools.commands.layer import plan

    try:
        config = text.case(args.case, args.rank, args.dropout, args.variant)
        arch = args.arch or (environment.arch(torch.cuda.current_device()) if torch.cuda.is_available() else "sm_90")
        if args.backend != "auto" and args.four_bit is None:
            raise ValueError(f"--backend {args.backend} chooses the kernels of a 4-bit weight: give --four-bit too")
        plans = plan(args.layer, config, BY_NAME[args.dtype], arch, args.bias, args.four_bit, args.backend)
    except (ValueError, RuntimeError) as error:
        print(f"info --layer: {error}", file=sys.stderr)
        return 2
    m, n, k = args.layer
    if args.json:
        head = {"m": m, "n": n, "k": k, "arch": arch, "dtype": args.dtype, "config": config.to_dict()}
        head["four_bit"] = args.four_bit
        print(json.dumps(head | {name: asdict(p) | {"launches": p.launches} for name, p in plans.items()}, indent=1))
        return 0
    title = _title(config, args.bias) + (f", {args.four_bit} base" if args.four_bit else "")
    print(f"{title}: M={m} tokens, N={n}, K={k}, {args.dtype}, in training on {arch}\n")
    for name, p in plans.items():
        print(f"{name}: {p.count()}; route {p.route} ({p.decided_by})")
        columns = ["", "kernel", "file", "grid", "blocks", "warps", "stages", "how", "configuration"]
        rows = [
            (i, s.kernel, s.file, s.grid, s.blocks, s.warps or "", s.stages or "", s.features, s.source)
            for i, s in enumerate(p.steps, start=1)
        ]
        print(text.table(columns, rows))
    return 0


def _title(config: GLoRAConfig, bias: bool) -> str:
    supports = [f"{name}={getattr(config, name)}" for name in "ABCDE" if getattr(config, name) != "none"]
    supports += [f"rank {config.rank}"] * ("lora" in (config.A, config.B, config.C))
    supports += [f"dropout {config.dropout:g}"] * (config.dropout > 0) + [config.variant] * (config.variant == "matmul")
    return ", ".join([*supports, "bias" if bias else "no bias"])


def _versions() -> dict[str, str]:
    from glora_kernels.runtime import environment

    return {"python": platform.python_version()} | {name: environment.version(name) for name in PACKAGES}


def _devices() -> list[dict[str, str]]:
    import torch

    from glora_kernels.runtime import environment

    found = [{"name": "cpu", "about": f"{platform.machine()}, {torch.get_num_threads()} threads"}]
    found += [{"name": f"cuda:{i}", "about": about} for i, about in enumerate(environment.gpus())]
    if len(found) == 1:
        found.append({"name": "cuda", "about": "none: PyTorch sees no GPU"})
    return found


def _built() -> dict[str, str]:
    from glora_kernels.runtime import environment, extension, routes

    interpreter = "on (TRITON_INTERPRET=1)" if environment.interpreting() else "off"
    state = "compiled at the first call on a GPU" if environment.has_triton() else "unavailable: no triton package"
    return {
        "Triton kernels": state,
        "Triton interpreter": interpreter,
        "CUDA extension": missing
        if (missing := extension.why_missing()) is not None
        else _extension(extension.build_info()),
        "backend": routes.current_backend(),
    }


def _extension(info: dict[str, Any]) -> str:
    return f"built for sm_{', sm_'.join(info['archs'])} by nvcc {info['nvcc']}; 4-bit layers take it"


def _tables() -> list[dict[str, str]]:
    """The tables of measured configurations that the GPUs here use; without a GPU, those that are shipped."""
    import torch

    from glora_kernels.runtime import environment, tables

    rows = []
    archs = sorted({environment.arch(i) for i in range(torch.cuda.device_count())})
    paths = [(path.name, path) for path in sorted(tables.SHIPPED.glob("*.json"))] if not archs else []
    for arch in archs:
        name = f"{environment.slug(environment.device_of(arch) or arch)}.json"
        paths += [(arch, environment.tables_directory() / name), (arch, tables.SHIPPED / name)]
    for serves, path in paths:
        if path.is_file():
            rows.append({"table for": serves, "file": str(path), "entries": _entries(path)})
    if not rows:
        about = f"none: every card takes its defaults (`tune` would write to {environment.tables_directory()})"
        rows.append({"table for": "-", "file": about, "entries": "0"})
    return rows


def _entries(path: Any) -> str:
    from glora_kernels.runtime import tables

    try:
        table = tables.read(path)
    except ValueError as error:
        return f"unusable: {error}"
    counts = f"{len(table.configs)} configurations, {len(table.routes)} routes, {len(table.four_bit)} of 4-bit layers"
    return f"{counts}; torch {table.torch}, triton {table.triton}, {table.date}"


def _routes() -> list[dict[str, str]]:
    """Which path "auto" takes on each device, and why; a GPU is listed where there is none, as what would be."""
    import torch

    from glora_kernels.runtime import routes

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
    forward, backward = "_prepare_kernel, _glora_fwd_kernel", "_dy_kernel, _x_kernel, _finish_kernel, _glora_dx_kernel"
    rows = (
        ("LoRA, A none", "2", "low-rank and bias terms added to the product", f"{forward}; {backward}"),
        ("A vector or constant", "2", "rows scaled after the product; dA recovered from y",
         f"{forward}; {backward}"),
        ("A lora", "3", "W_eff in one reused workspace, rebuilt in backward",
         f"{forward}; _dy_kernel, _hadamard_grad_kernel, _finish_kernel, _glora_dx_kernel"),
        ("A lora, product variant", "2", "LoRA with W·A_up in the place of B_up", f"{forward}; {backward}"),
        ("C", "+0", "W read once more in each pass", "_wc_kernel; _wc_grad_kernel, _c_grad_kernel"),
        ("D or E", "+0", "one vector, made where it is added", "none of their own"),
        ("any, 4-bit base", "+0", "W or W_eff dequantized into the workspace in each pass; a few tokens read the codes",
         "_dequantize_kernel or _dequantize_adapted_kernel; _small_m_kernel; or those of csrc"),
        ("any, on the library route", "", "the vendor's product in the place of _glora_fwd_kernel, _glora_dx_kernel",
         "_added_terms_kernel in the place of _prepare_kernel"),
    )  # fmt: skip
    return [dict(zip(("layer", "products", "how", "kernels on a GPU"), row, strict=True)) for row in rows]
