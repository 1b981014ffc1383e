"""Structure search on a small LLaMA: which layers get what, against LoRA with as many parameters and steps.

    python examples/search_text.py
    python examples/search_text.py --quick

The text is documentation of Python's standard library. A decoder of about a million parameters is trained on what it
says about programs, files and protocols, and frozen; then LoRA, a hand-picked GLoRA, and a searched configuration adapt
it to what the library says about numbers. All get the same text and number of steps: the searched one has as many in
all, half for its supernet and half for training its best candidates on. A search sees validation text only, and all are
tested on text that no training and no choice has seen. Every run is reported.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import glora_kernels as gk
from glora_kernels.search import Candidate, parameters_of

if missing := [name for name in ("matplotlib", "tqdm", "transformers") if find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(missing)}; the examples need: pip install 'glora_kernels[examples]'")

from arguments import plus_minus
from docstring_text import Corpus, entropy
from language_model import WINDOW, build_model, held_out_loss, train
from search_study import (
    Budget,
    Sampled,
    add_arguments,
    differences,
    parse_arguments,
    search_and_finish,
    show,
    spread,
    table,
    write,
)
from text_study import BATCH, load_parts, pretrain
from tqdm import tqdm

WIDTH, DEPTH = 128, 4
LORA, GLORA, SEARCHED, ALONE = "LoRA", "GLoRA", "searched", "searched, alone"
RATE = 1e-2
"""Of all methods; what sharelora_study.py chose for LoRA. Nothing was tuned for the others."""

SWITCH_OFF = 0.5
"""How often training leaves a layer of the supernet alone; the search does so as often."""

SPACE = gk.SearchSpace(B=("none", "lora"), C=("none",), ranks=(2, 4, 6, 8, 16), scale=2.0)
CONFIGS = {
    LORA: gk.GLoRAConfig.lora(rank=8, alpha=16),
    GLORA: gk.GLoRAConfig("vector", "lora", "none", "none", "vector", rank=6, alpha=12),
}


@dataclass(frozen=True)
class Sizes:
    """How much is run; `validation` and `depth` are windows to choose by and decoder layers."""

    budget: Budget
    pretraining_steps: int
    validation: int = 16
    depth: int = DEPTH


SIZES = {
    "full": Sizes(Budget(200, 100, 2, 50, 20, 5), 250),
    "quick": Sizes(Budget(40, 20, 2, 10, 10, 2), 60, 8),
    "smoke": Sizes(Budget(4, 2, 1, 2, 3, 1), 3, 1, 1),
}


class Study:
    """A frozen base, the text that it is adapted to, and what one seed does with both."""

    def __init__(self, base: nn.Module, numbers: Corpus, sizes: Sizes, args: argparse.Namespace, bar: tqdm) -> None:
        self.base, self.numbers, self.sizes, self.args, self.bar = base, numbers, sizes, args, bar
        self.validation = numbers.validation[: sizes.validation * WINDOW + 2]

    def fit(self, model: nn.Module, steps: int, seed: int) -> None:
        train(
            model, self.numbers.training, self.validation[: WINDOW + 2], steps=steps, batch=BATCH, learning_rate=RATE,
            seed=seed, on_step=self.bar.update,
        )  # fmt: skip

    def run(self, seed: int, draw: bool) -> dict[str, Any]:
        """All methods with one seed."""
        budget = self.sizes.budget
        self.bar.set_description(f"{SEARCHED}, seed {seed}")
        torch.manual_seed(seed)
        net = gk.Supernet(copy.deepcopy(self.base), SPACE, seed=seed)
        picked: dict[str, Candidate] = {name: dict.fromkeys(net.spaces, config) for name, config in CONFIGS.items()}
        limit = parameters_of(picked[LORA], net.shapes)
        started = time.perf_counter()
        self.fit(Sampled(net, switch_off=SWITCH_OFF, max_parameters=limit), budget.supernet_steps, seed)
        seconds = time.perf_counter() - started
        found = search_and_finish(
            net,
            partial(held_out_loss, tokens=self.validation),
            partial(self.fit, steps=budget.retraining_steps, seed=seed + 1000),
            budget,
            seed,
            limit,
            picked,
            self.args.out / f"text-{seed}.jsonl",
        )
        if draw:
            found.search.plot(self.args.out / "text.png")
        random = next(done.candidate for done in found.search.finished if done.name is None)
        best = found.best.candidate
        models = {
            name: self.trained(name, own, seed) for name, own in {**picked, "random": random, ALONE: best}.items()
        }
        models[SEARCHED] = found.model
        losses = {name: held_out_loss(model, self.numbers.test) for name, model in models.items()}
        self.bar.write(f"seed {seed}: {losses}")
        parameters = {name: gk.trainable_parameters(model) for name, model in models.items()}
        return {
            "seed": seed, "limit": limit, "losses": losses, "trainable": parameters, "supernet_seconds": seconds,
            **found.summary(),
        }  # fmt: skip

    def trained(self, name: str, candidate: Candidate, seed: int) -> nn.Module:
        """A copy of the base with fresh adapters, trained for all steps."""
        self.bar.set_description(f"{name}, seed {seed}")
        torch.manual_seed(seed)
        chosen = {path: config for path, config in candidate.items() if not config.is_empty}
        model = gk.inject(copy.deepcopy(self.base), chosen, list(chosen))
        self.fit(model, self.sizes.budget.steps, seed)
        return model


def tables(runs: list[dict[str, Any]], sizes: Sizes, before: float) -> list[str]:
    names = list(runs[0]["losses"])
    losses = {name: [run["losses"][name] for run in runs] for name in names}
    rows = [
        [str(run["seed"]), *(f"{run['losses'][name]:.4f}" for name in names), f"{run['trainable'][SEARCHED]:,}"]
        for run in runs
    ]
    rows.append(["mean", *(spread(losses[name], ".4f") for name in names), ""])
    paired = []
    for name in names[:-1]:
        d = differences(losses[SEARCHED], losses[name])
        paired.append(
            [
                name,
                plus_minus(d["mean"], d["standard_error"], len(runs), "+.4f"),
                f"{len(runs) - d['higher']} of {len(runs)}",
            ]
        )
    scores = [[run[key] for run in runs] for key in ("random_mean", "inherited_best")]
    return [
        f"Loss on test text, nats a token, after {sizes.budget.steps} steps of {BATCH} x {WINDOW} tokens, at "
        f"most {runs[0]['limit']:,} parameters; the base itself has {before:.4f}. {SEARCHED}: "
        f"{sizes.budget.searched_steps} steps in all, with those of its supernet. {ALONE}: the same configuration, "
        "trained as the others are",
        table(["seed", *names, "trainable, searched"], rows),
        table(["searched − ...", "nats, mean ± standard error", "not higher"], paired),
        f"Validation loss with inherited weights: {spread(scores[0], '.4f')} the mean random candidate within the "
        f"limit, {spread(scores[1], '.4f')} the best one found.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Structure search on a small LLaMA, against LoRA with as many parameters and steps.",
        epilog="Needs: pip install 'glora_kernels[examples]'",
    )
    add_arguments(parser, out="out/search_text", seeds=3)
    args = parse_arguments(parser)
    sizes = SIZES[args.size]
    programs, numbers = load_parts(args.device, short=args.size == "smoke")
    torch.manual_seed(0)
    base = build_model(WIDTH, sizes.depth).to(args.device)
    total = sizes.pretraining_steps + args.seeds * (len(CONFIGS) + 3) * sizes.budget.steps
    started = time.perf_counter()
    with gk.backend(args.backend), tqdm(total=total, unit="step", desc="pretraining") as bar:
        pretrain(base, programs, sizes.pretraining_steps, bar.update)
        study = Study(base, numbers, sizes, args, bar)
        before = held_out_loss(base, numbers.test)
        runs = [study.run(seed, draw=seed == 0) for seed in range(args.seeds)]
    count = sum(parameter.numel() for parameter in base.parameters())
    about = (
        f"Structure search on a LLaMA of {count:,} parameters; token frequencies alone give the test text a loss of "
        f"{entropy(numbers.test):.4f}."
    )
    seconds = time.perf_counter() - started
    results = {"text": {"seconds": seconds, "before": before, "runs": runs}}
    write(args.out, about, args, sizes, results, [*tables(runs, sizes, before), f"({seconds:.0f} s)"])
    show(args.out)


if __name__ == "__main__":
    main()
