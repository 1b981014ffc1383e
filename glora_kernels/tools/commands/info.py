"""`python -m glora_kernels info`: this machine and installation, or the kernels that serve a model or a layer."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from torch import Tensor

from glora_kernels.runtime import environment, extension, routes, tables
from glora_kernels.spec import SHARED_FACTORS
from glora_kernels.tools import planned
from glora_kernels.tools.commands import model, models, text
from glora_kernels.tools.commands.layer import Call, base, called, fused, plan, shared
from glora_kernels.tools.commands.printing import Refused, Report, Table

HELP = "this machine and installation; which kernels serve the layers of a model, or one layer, and why"
DESCRIPTION = """Alone: versions, devices, tables and routes. With --config, which kernels serve each layer of a \
model, how many layers are alike, and what stays as it is; with --layer or --module, the launches of one layer, in \
order, with their configurations. Plans are made for a card that need not be here."""
FACTS = {
    "versions, devices, built, tables, routes, layers": "alone: this machine and installation",
    "dtype, config, four_bit, share": "with --layer and --config: what was asked for",
    "m, n, k, siblings": "with --layer, too",
    "module": "with --module: its name",
    "arch": "with --layer, --module and --config: the card's, or cpu",
    "forward, backward": "with --layer and --module: steps (kernel, file, grid, blocks, warps, stages, features, "
    "source), launches, route, decided_by, through (the line that launches them)",
    "model, tokens, trainable, compilations, here, notes": "with --config: its name, M, how many parameters are "
    "trained, how many kernels a first step compiles, what this machine takes, and what inject warned of",
    "groups": "with --config, for each kind of adapted layer: layers (their names, # for numbers), number, n, k, "
    "experts, kernel, base, adapter, bias, operator, why, forward and backward as above (null where PyTorch serves)",
    "untouched": "with --config, what is not adapted: layers, number, module (its class), shape, why",
}
PACKAGES = ("glora_kernels", "torch", "triton", "safetensors", "peft", "transformers", "bitsandbytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_config(parser, "which kernels serve each layer of this model, and why")
    parser.add_argument(
        "--layer", type=text.sizes, metavar="MxNxK",
        help="tokens x out_features x in_features: print the steps of this layer's forward and backward",
    )  # fmt: skip
    parser.add_argument(
        "--module", metavar="NAME:FUNCTION",
        help="the same of a module of your own: FUNCTION of the Python module NAME is called with the meta device as "
        "default, and returns it and its input (a layer of PEFT after accelerate(), say)",
    )  # fmt: skip
    text.add_case(parser)
    parser.add_argument(
        "--tokens", type=text.positive, default=8192, metavar="M", help="of --config: rows of x (default: 8192)"
    )
    model.add_what(parser)
    parser.add_argument("--experts", action="store_true", help="of --config: adapt the experts too")
    parser.add_argument(
        "--siblings", type=text.positive, nargs="+", default=[], metavar="N",
        help="with --layer: more layers that take its x, by their out_features, fused with it",
    )  # fmt: skip
    parser.add_argument(
        "--share", choices=tuple(SHARED_FACTORS),
        help="with --layer: two such layers, which share factors, inside shift_once and deferred_shared_grads; with "
        "--config: ShareLoRA",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("auto", "triton", "cuda"), default="auto",
        help="with --four-bit: whose kernels serve the 4-bit weight (default: those that are measured or expected to)",
    )  # fmt: skip
    parser.add_argument(
        "--arch", type=text.architecture, help="the card's, like sm_90, or cpu (default: this GPU's, else sm_90)"
    )


def run(args: argparse.Namespace) -> Report:
    if sum(asked is not None for asked in (args.layer, args.module, args.config)) > 1:
        raise Refused("--layer, --module and --config are three questions: give one of them")
    if args.config is not None:
        return model.report(args)
    if args.layer is not None or args.module is not None:
        return _layer(args)
    pairs = {"versions": _versions(), "devices": _devices(), "built": _built()}
    rows = {"tables": _tables(), "routes": _routes(), "layers": _layers()}
    devices = [{"name": name, "about": about} for name, about in pairs["devices"].items()]
    heads = {"versions": ("package", "version"), "devices": ("device", "what it is"), "built": ("part", "state")}
    said: list[str | Table] = [Table(heads[name], list(found.items())) for name, found in pairs.items()]
    said += [Table(list(of[0]), [list(row.values()) for row in of]) for of in rows.values()]
    said.append("products: those of the size of W in one forward and backward; a frozen linear layer has 2.")
    said.append("The kernels of a model's layers: info --config PATH_OR_NAME. Of one layer, in order and with their "
                "configurations: info --layer MxNxK --case ...")  # fmt: skip
    return Report(pairs | {"devices": devices} | rows, said)


def _layer(args: argparse.Namespace) -> Report:
    option = "--module" if args.module else "--layer"
    if not environment.has_triton():
        raise Refused(f"{option} plans Triton launches, and the triton package is not installed")
    arch = args.arch or text.this_arch()
    if arch == "cpu":
        raise Refused(f"{option} plans launches, and {routes.explain('cpu', tables.DTYPES[args.dtype])[1]}")
    with text.refusing(option):
        title, head, call, x = _own_module(args) if args.module else _asked_for(args)
        plans = plan(planned.of_module(call, x.requires_grad_(), arch, args.backend))
    said: list[str | Table] = [f"{title}, in training on {arch}\n"]
    columns = ["", "kernel, file", "grid", "blocks", "warps", "stages", "how", "configuration"]
    for name, p in plans.items():
        said.append(f"{name}: {p.count()}; route {p.route} ({p.decided_by})")
        said.append(f"{'the module' if args.module else 'nn.GLoRALinear'} -> {p.through} -> the file of each kernel")
        said.append(Table(columns, [
            (i, f"{step.kernel} {step.file.removeprefix('glora_kernels/')}", *(cell or "" for cell in step[2:]))
            for i, step in enumerate(p.steps, start=1)
        ]))  # fmt: skip
    return Report(head | {"arch": arch} | {name: p.facts() for name, p in plans.items()}, said)


_Asked = tuple[str, dict[str, object], Call, Tensor]
"""A call: its title, the head of its JSON, the module or function, and its input."""


def _own_module(args: argparse.Namespace) -> _Asked:
    call, x = called(args.module)
    return (
        f"{args.module}: x {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}",
        {"module": args.module},
        call,
        x,
    )


def _asked_for(args: argparse.Namespace) -> _Asked:
    config, (m, n, k), dtype = text.case(args), args.layer, tables.DTYPES[args.dtype]
    if args.backend != "auto" and args.four_bit is None:
        raise ValueError(f"--backend {args.backend} chooses the kernels of a 4-bit weight: give --four-bit too")
    if args.siblings and args.share:
        raise ValueError("--siblings are fused layers of one block, --share is over depth: give one of them")
    sizes = [n, n] if args.share else [n, *args.siblings]
    bases = [base(size, k, dtype, args.bias, args.four_bit) for size in sizes]
    call = shared(bases, config, args.share) if args.share else fused(bases, config)
    title = (
        text.title(config)
        + (", bias" if args.bias else ", no bias")
        + (f", {args.four_bit} base" if args.four_bit else "")
    )
    title += f", two layers, share={args.share}" if args.share else ""
    title += f": M={m} tokens, N={', '.join(map(str, sizes[: 1 if args.share else None]))}, K={k}, {args.dtype}"
    head = {"m": m, "n": n, "k": k, "dtype": args.dtype, "config": config.to_dict(), "four_bit": args.four_bit}
    more = {"siblings": args.siblings, "share": args.share}
    return (
        title,
        head | {name: value for name, value in more.items() if value},
        call,
        torch.empty(m, k, dtype=dtype, device="meta"),
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: environment.version(name) for name in PACKAGES}


def _devices() -> dict[str, str]:
    gpus = {f"cuda:{i}": about for i, about in enumerate(environment.gpus())}
    return {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"} | (
        gpus or {"cuda": "none: PyTorch sees no GPU"}
    )


def _built() -> dict[str, str]:
    built = extension.why_missing()
    if built is None:
        info = extension.build_info()
        built = f"built for sm_{', sm_'.join(info['archs'])} by nvcc {info['nvcc']}; 4-bit layers take it"
    return {
        "Triton kernels": "compiled at the first call on a GPU"
        if environment.has_triton()
        else "unavailable: no triton package",
        "Triton interpreter": "on (TRITON_INTERPRET=1)" if environment.interpreting() else "off",
        "CUDA extension": built,
        "backend": routes.chosen(),
    }


def _tables() -> list[dict[str, str]]:
    """The tables of measured choices that the GPUs here use; without a GPU, those that are shipped."""
    archs = sorted({environment.arch(i) for i in range(torch.cuda.device_count())}) or [""]
    found = [(arch or path.name, path) for arch in archs for _, path in tables.files(arch)]
    rows = [{"table for": serves, "file": str(path), "entries": _entries(path)} for serves, path in found]
    about = f"none: every card takes its defaults (`tune` would write to {environment.tables_directory()})"
    return rows or [{"table for": "-", "file": about, "entries": "0"}]


def _entries(path: Path) -> str:
    try:
        table = tables.read(path)
    except ValueError as error:
        return f"unusable: {error}"
    kinds = [row.what.split()[0] if row.what in tables.NAMED else "kernel" for row in table.rows]
    counts = f"{kinds.count('kernel')} configurations, {kinds.count('route')} routes, {kinds.count('4-bit')}"
    return f"{counts} of 4-bit layers; torch {table.torch}, triton {table.triton}, {table.date}"


def _routes() -> list[dict[str, str]]:
    """The path that "auto" takes on each device, and why; a GPU is listed also where there is none."""
    rows = []
    for device in ("cpu", "cuda"):
        here = device == "cpu" or torch.cuda.is_available()
        for dtypes in (routes.TRITON_DTYPES, (torch.float64,)):
            route, why = routes.explain(device, dtypes[0])
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            rows.append({"device": device if here else f"{device} (none here)", "dtype": names,
                         "route": route, "why": why})  # fmt: skip
    return rows


def _layers() -> list[dict[str, str]]:
    """For each kind of layer, the GEMM-sized products of a forward and backward, and the kernels on a GPU."""
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
        ("A, B, D or E constant", "+0", "a gradient (N,) is summed over N", "_totals_kernel, or in _glora_dx_kernel"),
        ("any, on the library route", "", "the vendor's product in the place of _glora_fwd_kernel, _glora_dx_kernel",
         "_added_terms_kernel; _prepare_kernel for U, W_eff, W∘(1+a)"),
    )  # fmt: skip
    return [dict(zip(("layer", "products", "how", "kernels on a GPU"), row, strict=True)) for row in rows]
