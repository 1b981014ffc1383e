"""What the guides' scripts share: their arguments, a small model, text and pictures, and how results are shown.

The model and the data stand in for your own. Nothing is downloaded: the model is made from its configuration, the text
is the documentation inside Python's standard library, the pictures are scikit-learn's scanned digits.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # docstring_text stands one folder up


if absent := [name for name in ("matplotlib", "tqdm", "transformers") if find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(absent)}; the examples need: pip install 'glora_kernels[examples]'")

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import trange

VOCABULARY, WINDOW = 1024, 64
"""Different tokens, and tokens of one sample."""

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]


def missing(*packages: str) -> str:
    """What to say where packages are missing, or ""; "module=project" where pip's name is another one."""
    projects = dict((package.split("=") * 2)[:2] for package in packages)
    names = [project for module, project in projects.items() if find_spec(module) is None]
    return f"missing: {', '.join(names)}; this guide needs: pip install {' '.join(projects.values())}" if names else ""


def parse_arguments(
    text: str | None, *, steps: int, smoke: int, methods: list[str] | None = None
) -> argparse.Namespace:
    """The arguments that every guide has; a bad one ends the process with code 2.

    Args:
        text: the script's docstring, shown by --help.
        steps: how many it trains.
        smoke: how many with --smoke.
        methods: the choices of --methods, all by default; None: there is no such argument.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=steps, help=f"training steps of each run (default: {steps})")
    add("--smoke", action="store_true", help=f"{smoke} steps, to see that it runs here")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda where there is one")
    add("--out", type=Path, default=Path("out/guides"), help="folder for pictures and adapters (default: out/guides)")
    if methods:
        add("--methods", nargs="+", choices=methods, default=methods, help=f"default: {' '.join(methods)}")
    args = parser.parse_args()
    if args.smoke:
        args.steps = smoke
    if args.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {args.steps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device here")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} exists and is not a folder")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def build_decoder() -> Any:
    """A LLaMA of two layers with fresh weights, always the same ones; your `from_pretrained(...)` goes here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            initializer_range=0.1,  # logits far from uniform, so that what an adapter changes is seen
            use_cache=False,
        )
    )


@functools.cache
def load_texts() -> list[str]:
    """What Python's library says about its modules of numbers: a few hundred texts."""
    from docstring_text import NUMBERS, read_docstrings

    return read_docstrings(NUMBERS)


@functools.cache
def train_tokenizer() -> Any:
    """A byte-pair tokenizer made from the texts; a checkpoint brings its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(load_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def load_windows() -> list[dict[str, Tensor]]:
    """The texts as samples of WINDOW tokens: input_ids, and the same as labels."""
    tokens = torch.tensor(train_tokenizer()("<end>".join(load_texts()))["input_ids"])
    return [{"input_ids": part, "labels": part} for part in tokens.unfold(0, WINDOW, WINDOW)]


def stack(samples: list[dict[str, Tensor]], device: str) -> dict[str, Tensor]:
    """A batch of samples."""
    return {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}


def train(model: nn.Module, samples: list[dict[str, Tensor]], args: argparse.Namespace, name: str) -> list[float]:
    """The loss of every step of an ordinary loop, on batches of 8 that are the same in every run."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in trange(args.steps, desc=name):
        chosen = torch.randint(len(samples), (8,), generator=generator).tolist()
        loss = model(**stack([samples[i] for i in chosen], args.device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    """The logits of some samples, outside training."""
    device = next(model.parameters()).device
    return model.eval()(input_ids=stack(samples, str(device))["input_ids"]).logits.cpu()


def largest_difference(one: Tensor | list[float], other: Tensor | list[float]) -> float:
    """max |one - other| in float64."""
    return (torch.as_tensor(one).double() - torch.as_tensor(other).double()).abs().max().item()


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows of text in columns, the first row as the heading; all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print()


def draw_losses(curves: dict[str, list[float]], title: str, path: Path) -> None:
    """Training loss by step, a curve a run; each later one is drawn thinner, so that equal ones stay visible."""
    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for index, (name, losses) in enumerate(curves.items()):
        width = 4.5 / (1 + index)
        panel.plot(range(1, len(losses) + 1), losses, label=name, color=COLORS[index], linewidth=width, marker=".")
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("training loss")
    panel.set_title(title)
    panel.grid(alpha=0.3)
    panel.legend()
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")
