"""`python -m glora_kernels params`: what LoRA and ShareLoRA train on a model, counted on the meta device."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from glora_kernels.nn import inject, trainable_parameters
from glora_kernels.nn.base import is_linear
from glora_kernels.nn.model import all_paths
from glora_kernels.spec import Share, ShareLoRAConfig, select
from glora_kernels.tools.commands import models, text
from glora_kernels.tools.commands.models import Sizes
from glora_kernels.tools.commands.printing import Refused, Report, Table

HELP = "trainable parameters, file and optimizer bytes of LoRA and ShareLoRA on a model; no weights needed"
DESCRIPTION = """Count what LoRA and ShareLoRA train on a model: its skeleton is made on the meta device, which holds \
no values, and adapted by gk.inject. A shared factor counts once, as in the optimizer and in the file. Share-qkv \
shares A among q, k and v each, and is plain LoRA elsewhere."""
FACTS = {
    "rank, targets": "as given",
    "models": "for each model what it was made of: sizes, or the config",
    "rows": "for each model and method: parameters (trained), file_bytes (in bf16), optimizer_bytes (AdamW)",
    "notes": "what inject warned of, such as experts that are left as they are",
}
DEFAULT = ("llama-7b", "llama-13b", "llama-3-8b")
QKV = ("q_proj", "k_proj", "v_proj")
CUSTOM = "custom"
"""The name of a model that the user gives by its sizes."""


@dataclass(frozen=True)
class Count:
    """One row: the trained parameters, their bytes in a bf16 file, and the bytes of AdamW's two fp32 states."""

    model: str
    method: str
    parameters: int
    file_bytes: int
    optimizer_bytes: int


def methods(rank: int, targets: Sequence[str] | None, paths: Iterable[str]) -> dict[str, ShareLoRAConfig]:
    """The configuration of each method for a model with these linear layers; Share-qkv only if q, k or v is adapted."""
    shares: dict[str, Share] = {"LoRA": "none", "ShareA": "A", "ShareB": "B", "ShareAB": "AB"}
    found = {name: ShareLoRAConfig(rank=rank, share=share) for name, share in shares.items()}
    paths = set(paths)
    selected = paths if targets is None else {path for pattern in targets for path in select(pattern, paths)}
    shared = tuple(name for name in QKV if any(path.split(".")[-1] == name for path in selected))
    if shared:
        found["Share-qkv"] = ShareLoRAConfig(rank=rank, share="A", projections=shared)
    return found


def count(name: str, make: Callable[[], nn.Module], rank: int, targets: Sequence[str] | None = None) -> list[Count]:
    """Count what every method trains on one model.

    Args:
        name: of the model, for the rows.
        make: makes the model, on the meta device.
        rank: R.
        targets: patterns of the layers to adapt; None: every linear layer but the head.

    Raises:
        ValueError: a target matches no layer; the message lists the layers.
    """
    rows = []
    linears = [path for path, module in all_paths(make()) if is_linear(module)]
    for method, config in methods(rank, targets, linears).items():
        model = inject(make(), config, target_modules=None if targets is None else list(targets))
        parameters = trainable_parameters(model)
        rows.append(Count(name, method, parameters, 2 * parameters, 8 * parameters))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_config(parser, f"the models (default: {' '.join(DEFAULT)})", several=True)
    parser.add_argument("--rank", type=text.positive, default=64, help="R (default: 64)")
    parser.add_argument(
        "--targets", nargs="+", metavar="PATTERN",
        help="adapt only these, as q_proj v_proj, or *.mlp.* (default: every linear layer but the head)",
    )  # fmt: skip
    parser.add_argument("--hidden", type=text.positive, help="a LLaMA of other sizes, with --intermediate")
    parser.add_argument("--intermediate", type=text.positive, help="of these sizes: the width of its MLP")
    parser.add_argument("--layers", type=text.positive, help="of these sizes: its decoder layers (default: 32)")
    parser.add_argument("--kv", type=text.positive, help="of these sizes: out_features of k and v (default: hidden)")


def run(args: argparse.Namespace) -> Report:
    asked = _models(args)
    try:
        with text.noted() as notes:
            rows = [
                row for name, made in asked.items()
                for row in count(name, functools.partial(_made, made), args.rank, args.targets)
            ]  # fmt: skip
    except ValueError as error:
        raise Refused(str(error)) from error
    facts = {
        "rank": args.rank, "targets": args.targets,
        "models": {name: made if isinstance(made, str) else asdict(made) for name, made in asked.items()},
        "rows": [asdict(row) for row in rows], "notes": notes,
    }  # fmt: skip
    plain = {row.model: row.parameters for row in rows if row.method == "LoRA"}
    width = max(len(f"{row.parameters:,}") for row in rows)
    cells = [
        (
            row.model, row.method, f"{row.parameters:{width},}", f"{row.parameters / plain[row.model]:6.1%}",
            _bytes(row.file_bytes), _bytes(row.optimizer_bytes),
        )
        for row in rows
    ]  # fmt: skip
    return Report(facts, [
        f"rank {args.rank}, {'every linear' if args.targets is None else ', '.join(args.targets)}\n",
        Table(["model", "method", "trainable", "of LoRA", "bf16 file", "AdamW state"], cells),
        "bf16 file: two bytes a parameter, with adapter_dtype=torch.bfloat16. AdamW state: two fp32 values of each.",
        *notes,
    ])  # fmt: skip


def _made(of: Sizes | str) -> nn.Module:
    return models.build(of, torch.float32) if isinstance(of, str) else models.skeleton(of)


def _models(args: argparse.Namespace) -> dict[str, Sizes | str]:
    """The models that the arguments ask for, by name: known ones and others of given sizes, or a config."""
    own = {name: getattr(args, name) for name in ("hidden", "intermediate", "layers", "kv")}
    if any(value is not None for value in own.values()):
        if args.config:
            raise Refused("--config names a model, --hidden and the like another; give one of them")
        if args.hidden is None or args.intermediate is None:
            raise Refused("a model of other sizes needs --hidden and --intermediate")
        return {CUSTOM: Sizes(args.hidden, args.intermediate, args.layers or 32, args.kv or args.hidden)}
    return {name: models.MODELS.get(name, name) for name in args.config or DEFAULT}


def _bytes(size: int) -> str:
    return f"{size / 2**20:7,.1f} MiB" if size >= 2**20 else f"{size / 2**10:7,.1f} KiB"
