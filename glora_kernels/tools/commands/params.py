"""`python -m glora_kernels params`: what LoRA and ShareLoRA train on known models, counted on the meta device."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from glora_kernels.nn import inject, trainable_parameters
from glora_kernels.spec import Share, ShareLoRAConfig, select
from glora_kernels.tools.commands import text

HELP = "trainable parameters, file and optimizer bytes of LoRA and ShareLoRA on a LLaMA-style model; no weights needed"
DESCRIPTION = """Count what LoRA and ShareLoRA train on models with LLaMA's linear layers: their skeleton is made on the
meta device, which holds no values, and adapted by gk.inject. A shared factor counts once, as in the optimizer and in
the file. Share-qkv shares A among q, k and v each, and is plain LoRA elsewhere."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine a LLaMA-style model's linear layers. kv: out_features of k_proj and v_proj."""

    hidden: int
    intermediate: int
    layers: int
    kv: int


MODELS = {
    "llama-7b": Sizes(4096, 11008, 32, 4096),
    "llama-13b": Sizes(5120, 13824, 40, 5120),
    "llama-3-8b": Sizes(4096, 14336, 32, 1024),
    "llama-3-70b": Sizes(8192, 28672, 80, 1024),
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


def skeleton(sizes: Sizes) -> nn.Module:
    """The linear layers of the decoder, under LLaMA's names, on the meta device. It cannot be called."""
    h, f, kv = sizes.hidden, sizes.intermediate, sizes.kv
    shapes = {
        "self_attn": {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)},
        "mlp": {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)},
    }

    def part(name: str) -> nn.Module:
        return nn.ModuleDict(
            {linear: nn.Linear(k, n, bias=False, device="meta") for linear, (n, k) in shapes[name].items()}
        )

    layers = nn.ModuleList(nn.ModuleDict({name: part(name) for name in shapes}) for _ in range(sizes.layers))
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})


def methods(rank: int, targets: Sequence[str] | None) -> dict[str, ShareLoRAConfig]:
    """The configuration of each method; Share-qkv only if q, k or v is adapted."""
    shares: dict[str, Share] = {"LoRA": "none", "ShareA": "A", "ShareB": "B", "ShareAB": "AB"}
    found = {name: ShareLoRAConfig(rank=rank, share=share) for name, share in shares.items()}
    paths = {f"model.layers.0.self_attn.{name}": name for name in QKV}
    selected = paths.keys() if targets is None else {path for pattern in targets for path in select(pattern, paths)}
    shared = tuple(name for path, name in paths.items() if path in selected)
    if shared:
        found["Share-qkv"] = ShareLoRAConfig(rank=rank, share="A", projections=shared)
    return found


def count(name: str, sizes: Sizes, rank: int, targets: Sequence[str] | None = None) -> list[Count]:
    """Count what every method trains on one model.

    Args:
        name: of the model, for the rows.
        sizes: of the model.
        rank: R.
        targets: patterns of the layers to adapt; None: every linear layer.

    Raises:
        ValueError: a target matches no layer; the message lists the layers.
    """
    rows = []
    for method, config in methods(rank, targets).items():
        model = inject(skeleton(sizes), config, target_modules=None if targets is None else list(targets))
        parameters = trainable_parameters(model)
        rows.append(Count(name, method, parameters, 2 * parameters, 8 * parameters))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help=f"of {', '.join(MODELS)} (default: {', '.join(DEFAULT)})"
    )
    parser.add_argument("--rank", type=text.positive, default=64, help="R (default: 64)")
    parser.add_argument(
        "--targets", nargs="+", metavar="PATTERN",
        help="adapt only these, as q_proj v_proj, or *.mlp.* (default: all seven linears of a layer)",
    )  # fmt: skip
    parser.add_argument("--hidden", type=text.positive, help="another model: its hidden size, with --intermediate")
    parser.add_argument("--intermediate", type=text.positive, help="another model: the width of its MLP")
    parser.add_argument("--layers", type=text.positive, help="another model: its decoder layers (default: 32)")
    parser.add_argument("--kv", type=text.positive, help="another model: out_features of k and v (default: hidden)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    try:
        models = _models(args)
        rows = [row for name, sizes in models.items() for row in count(name, sizes, args.rank, args.targets)]
    except ValueError as error:
        return text.refused(f"params: {error}")
    if args.json:
        head = {"rank": args.rank, "targets": args.targets}
        sizes_of = {name: asdict(sizes) for name, sizes in models.items()}
        print(json.dumps(head | {"models": sizes_of, "rows": [asdict(row) for row in rows]}, indent=1))
        return 0
    where = "every linear" if args.targets is None else ", ".join(args.targets)
    print(f"rank {args.rank}, {where}\n")
    plain = {row.model: row.parameters for row in rows if row.method == "LoRA"}
    width = max(len(f"{row.parameters:,}") for row in rows)
    cells = [
        (
            row.model, row.method, f"{row.parameters:{width},}", f"{row.parameters / plain[row.model]:6.1%}",
            _bytes(row.file_bytes), _bytes(row.optimizer_bytes),
        )
        for row in rows
    ]  # fmt: skip
    print(text.table(["model", "method", "trainable", "of LoRA", "bf16 file", "AdamW state"], cells))
    print(
        "bf16 file: two bytes a parameter, with adapter_dtype=torch.bfloat16. AdamW state: two fp32 values a parameter."
    )
    return 0


def _models(args: argparse.Namespace) -> dict[str, Sizes]:
    """The models that the arguments ask for, by name."""
    own = {name: getattr(args, name) for name in ("hidden", "intermediate", "layers", "kv")}
    if any(value is not None for value in own.values()):
        if args.model:
            raise ValueError("--model names a known model, --hidden and the like another; give one of them")
        if args.hidden is None or args.intermediate is None:
            raise ValueError("another model needs --hidden and --intermediate")
        return {CUSTOM: Sizes(args.hidden, args.intermediate, args.layers or 32, args.kv or args.hidden)}
    names = args.model or DEFAULT
    if unknown := [name for name in names if name not in MODELS]:
        raise ValueError(
            f"--model {unknown[0]!r} is not known; there are {', '.join(MODELS)}, or give --hidden, --intermediate, "
            "--layers and --kv"
        )
    return {name: MODELS[name] for name in names}


def _bytes(size: int) -> str:
    return f"{size / 2**20:7,.1f} MiB" if size >= 2**20 else f"{size / 2**10:7,.1f} KiB"
