"""`python -m glora_kernels warmup`: compile the kernels of a model's layers on this GPU before anybody trains it."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from glora_kernels.nn import warmup
from glora_kernels.nn.model import named_layers
from glora_kernels.runtime import environment, tables
from glora_kernels.spec import SHARED_FACTORS
from glora_kernels.tools.commands import models, text
from glora_kernels.tools.commands.model import adapted, add_what, config_of, key
from glora_kernels.tools.commands.printing import Refused, Report

HELP = "compile the kernels of a model's layers on this GPU, so that no later process has to"
DESCRIPTION = """Compile what the layers of a model launch in training (gk.warmup), for every number of tokens up to \
--tokens, into Triton's cache on the disk, where later processes find it: in a container image, say, or on a shared \
disk before a job with many ranks. It makes one layer of each kind, without weights. PEFT's layers launch the same \
kernels behind gk.accelerate."""
FACTS = {
    "arch, cache": "the card's architecture, and the folder that has the kernels",
    "model, config, dtype, four_bit, share, tokens, inference": "what was asked for",
    "kinds": "a line for each kind of layer: how many, the numbers of tokens, seconds",
    "skipped": "the number of adapted layers that gk.warmup leaves out: those of experts, convolutions",
    "seconds": "of everything",
    "notes": "what inject warned of",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_config(parser, "the model")
    text.add_case(parser)
    add_what(parser)
    parser.add_argument("--share", choices=tuple(SHARED_FACTORS), help="ShareLoRA")
    parser.add_argument(
        "--tokens", type=text.positive, nargs="+", default=[8192], metavar="M",
        help="rows of x: the largest number, for all up to it (default: 8192); or several, for these alone",
    )  # fmt: skip
    parser.add_argument("--inference", action="store_true", help="forward alone")


def run(args: argparse.Namespace) -> Report:
    if args.config is None:
        raise Refused("say which model: --config llama-3-8b, or the path of a config.json")
    if not torch.cuda.is_available() or not environment.has_triton():
        lacks = "PyTorch sees no GPU here" if environment.has_triton() else "the triton package is not installed"
        raise Refused(f"it compiles Triton kernels on a GPU, and {lacks}; `info --config` says how many a step takes")
    return warmed(args, torch.device("cuda"))


def warmed(args: argparse.Namespace, device: torch.device) -> Report:
    """Compile on a device; on a CPU the kernels are interpreted, and nothing is compiled."""
    begun, config = time.monotonic(), config_of(args)
    with text.noted() as notes, text.refusing("--config"):
        model = adapted(models.build(args.config, tables.DTYPES[args.dtype]), config, args)
        layers = named_layers(model)
        of_kind = {key(path, layer): layer for path, layer in layers.items() if layer.is_linear}
        tokens = args.tokens if len(args.tokens) > 1 else args.tokens[0]
        one_each = nn.ModuleList(_made(layer, device) for layer in of_kind.values())
        lines = warmup(one_each, tokens, training=not args.inference) if of_kind else []
    seconds, skipped = time.monotonic() - begun, sum(not layer.is_linear for layer in layers.values())
    cache = environment.triton_cache()
    facts = {
        "arch": text.this_arch(), "cache": cache, "model": args.config, "config": config.to_dict(), "dtype": args.dtype,
        "four_bit": args.four_bit, "share": args.share, "tokens": args.tokens, "inference": args.inference,
        "kinds": lines, "skipped": skipped, "seconds": round(seconds, 1), "notes": notes,
    }  # fmt: skip
    said = [f"{args.config}: {len(layers)} adapted layers of {len(of_kind)} kinds", *lines, *notes]
    said += [f"{skipped} layers of experts or convolutions were left out"] * (skipped > 0)
    return Report(facts, [*said, f"{seconds:.1f} s; the kernels are in {cache}, where later processes find them"])


@torch.no_grad()
def _made(layer: nn.Module, device: torch.device) -> nn.Module:
    """A layer of the meta device on another one, full of zeros."""
    layer.to_empty(device=device)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.zero_()
    return layer
