"""What sharelora_study.py and finetune_qlora_text.py share: arguments, the frozen base, and the checks of a run."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from arguments import add_where, need, settle_where
from docstring_text import Corpus, entropy, load_text
from language_model import VOCABULARY, WINDOW, Run, held_out_loss, train
from torch import Tensor, nn
from tqdm import tqdm

import glora_kernels as gk

PRETRAINING_RATE, PRETRAINING_BATCH = 3e-3, 8
BATCH = 4
TEST_TOKENS = 10_000
"""Of the text about programs, whose held-out part is large; about numbers, all of it is tested on."""


def add_arguments(parser: ArgumentParser, *, seeds: int, steps: int, pretraining_steps: int, out: str) -> None:
    """The arguments of both scripts, with one script's defaults."""
    add = parser.add_argument
    add("--rank", type=int, default=8, help="rank of every method; alpha is twice the rank")
    add("--seeds", type=int, default=seeds, help="runs of each method, with other text windows and a fresh adapter")
    add("--steps", type=int, default=steps, help="steps of each run")
    add("--pretraining-steps", type=int, default=pretraining_steps, help="steps of the base's own training")
    add_where(parser, out, "figures, results and adapters")
    add("--sweep", action="store_true", help="print how the learning rate was chosen, and stop")


def parse_arguments(parser: ArgumentParser, width: int) -> Namespace:
    """The arguments of the command line, with the device chosen; a bad one ends the process with code 2."""
    args = parser.parse_args()

    for argument in ("rank", "seeds", "steps", "pretraining_steps"):
        value = getattr(args, argument)
        need(parser, value >= 1, f"--{argument.replace('_', '-')}", f"must be at least 1, got {value}")
    need(parser, args.rank <= width, "--rank", f"must be at most {width}, the width of the model, got {args.rank}")
    settle_where(parser, args)
    return args


def load_parts(device: str, short: bool) -> tuple[Corpus, Corpus]:
    """The text about programs and about numbers, on a device; `short`: with few windows to test on."""
    programs, numbers = (part.to(torch.device(device)) for part in load_text(VOCABULARY))
    if short:
        return replace(programs, test=programs.test[: 9 * WINDOW]), replace(numbers, test=numbers.test[: 9 * WINDOW])
    return replace(programs, test=programs.test[:TEST_TOKENS]), numbers


def pretrain(base: nn.Module, programs: Corpus, steps: int, on_step: Callable[[], object]) -> Run:
    """Train the base on the text about programs, and freeze it."""
    run = train(
        base,
        programs.training,
        programs.test,
        steps=steps,
        batch=PRETRAINING_BATCH,
        learning_rate=PRETRAINING_RATE,
        seed=0,
        on_step=on_step,
    )
    base.requires_grad_(False)
    return run


def check_frozen(name: str, model: nn.Module, base: nn.Module) -> None:
    """Raises RuntimeError where a tensor of the base, 4-bit codes and their scales included, differs in `model`."""
    state = model.state_dict()
    for key, value in base.state_dict().items():
        if not torch.equal(state[key].view(torch.uint8), value.view(torch.uint8)):
            raise RuntimeError(f"{name}: training changed the frozen {key}")


def check_reload(name: str, plain: nn.Module, path: Path, tokens: Tensor, trained: float) -> None:
    """Load an adapter into a plain model. Raises RuntimeError where the loss is not exactly the trained one."""
    loss = held_out_loss(gk.load_adapter(plain, path), tokens)
    if loss != trained:
        raise RuntimeError(f"{name}: the adapter in {path} gives the loss {loss!r}, its training gave {trained!r}")


def sweep(
    names: Iterable[str],
    prepare: Callable[[str, int], nn.Module],
    numbers: Corpus,
    rates: list[float],
    args: Namespace,
    bar: tqdm,
) -> str:
    """A table of the mean validation loss of each method at each rate: how a learning rate was chosen.

    Args:
        names: of the methods.
        prepare: the model to train, of a name and a seed.
        numbers: trained on its first part, and compared by its second; the test text is not looked at.
        rates: the candidates.
        args: with `seeds` and `steps`.
        bar: advanced by each step.
    """
    lines = ["mean validation loss", f"{'learning rate':14}" + "".join(f"{rate:>9g}" for rate in rates)]
    for name in names:
        means = []
        for rate in rates:
            bar.set_description(f"{name}, rate {rate:g}")
            finals = []
            for seed in range(args.seeds):
                run = train(
                    prepare(name, seed),
                    numbers.training,
                    numbers.validation,
                    steps=args.steps,
                    batch=BATCH,
                    learning_rate=rate,
                    seed=seed,
                    on_step=bar.update,
                )
                finals.append(run.held_out[-1])
            means.append(statistics.mean(finals))
        lines.append(f"{name:14}" + "".join(f"{mean:9.4f}" for mean in means))
    return "\n".join(lines)


def print_text(programs: Corpus, numbers: Corpus, pretraining: Run, args: Namespace) -> None:
    print(
        f"\npretrained on {len(programs.training):,} tokens about programs in {pretraining.seconds:.0f} s: "
        f"held-out loss {pretraining.held_out[-1]:.3f} (token frequencies alone: {entropy(programs.test):.3f})"
    )
    print(
        f"adapted to {len(numbers.training):,} tokens about numbers, tested on {len(numbers.test):,} "
        f"(token frequencies alone: {entropy(numbers.test):.3f})"
    )
    print(f"rank {args.rank}, {args.steps} steps of {BATCH} x {WINDOW} tokens, {count_seeds(args)}, on {args.device}")


def count_seeds(args: Namespace) -> str:
    return "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"
