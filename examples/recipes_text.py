"""Published training methods against LoRA on a small LLaMA, at equal numbers of trainable parameters and steps.

    python examples/recipes_text.py
    python examples/recipes_text.py --methods BeamLoRA "LoRA-RITE" --seeds 5

The model is trained on what Python's documentation says about programs, and frozen; each method adapts its attention
layers to what it says about numbers. All have as many trainable parameters as LoRA at rank 8 (XGBLoRA: at rank 1), the
same windows of text and the same number of steps; DiffoRA gives half of them to finding its layers. LoRA Recycle and
MTL-LoRA are for several models and several tasks: the guide (docs/recipes.md) has scripts of both.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import recipes

if missing := [n for n in ("matplotlib", "pytorch_optimizer", "skdim", "tqdm", "transformers") if find_spec(n) is None]:
    sys.exit(f"missing: {', '.join(missing)}; this needs: pip install 'glora_kernels[examples,recipes,peft]'")

from arguments import add_where, need, plus_minus, settle_where
from docstring_text import Corpus
from language_model import WINDOW, build_model, held_out_loss, token_loss, train
from search_study import differences, machine, spread, table
from study_plots import draw_methods
from text_study import BATCH, load_parts, pretrain
from tqdm import tqdm

WIDTH, DEPTH, RANK = 96, 4, 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = "LoRA"

# Of 3e-3, 1e-2 and 3e-2 the one with the lowest loss on validation text, with a seed that is not reported
# (`--sweep` repeats it).
RATES = {
    LORA: 1e-2, "LoRA, rank 1": 3e-2, "LoRA+": 3e-3, "LoRA-FA": 1e-2, "LoRA-RITE": 3e-3, "BeamLoRA": 1e-2,
    "DiffoRA": 1e-2, "DynamicLoRA": 1e-2, "GeLoRA": 1e-2, "PRILoRA": 1e-2, "ChainOfLoRA": 1e-2, "XGBLoRA": 1e-2,
}  # fmt: skip
CANDIDATES = (3e-3, 1e-2, 3e-2)
SWEEP_SEED = 100


def config(rank: int) -> gk.GLoRAConfig:
    return gk.GLoRAConfig.lora(rank, 2 * rank)


@dataclass
class Prepared:
    """A model to train: its optimizer if it is not AdamW, what acts after a step, and how many steps it has."""

    model: nn.Module
    steps: int
    optimizer: torch.optim.Optimizer | None = None
    recipe: recipes.Recipe | None = None
    seconds: float = 0.0  # of steps before


class Study:
    """A frozen base and the text that it is adapted to."""

    def __init__(self, base: nn.Module, numbers: Corpus, args: argparse.Namespace, bar: tqdm) -> None:
        self.base, self.numbers, self.args, self.bar = base, numbers, args, bar

    def fresh(self, rank: int = RANK) -> nn.Module:
        return gk.inject(copy.deepcopy(self.base), config(rank), ATTENTION)

    def prepare(self, name: str, seed: int, rate: float) -> Prepared:
        """The model of a method, with fresh adapters."""
        torch.manual_seed(seed)
        steps = self.args.steps
        if name in ("LoRA, rank 1", "XGBLoRA"):
            model = self.fresh(1)
            if name != "XGBLoRA":
                return Prepared(model, steps)
            boosted = recipes.XGBLoRA(model, layers=len(ATTENTION) * DEPTH, steps=max(steps // 8, 1), seed=seed)
            return self.with_recipe(model, boosted, rate, boosted.parameters())
        if name == "GeLoRA":
            model = copy.deepcopy(self.base)
            windows = self.numbers.training[: 16 * WINDOW].view(16, WINDOW)
            scores = gk.intrinsic_ranks(model.eval(), [windows], ATTENTION)
            ranks = gk.allocate(scores, RANK * len(scores))  # in proportion to GeLoRA's, with LoRA's total
            return Prepared(gk.inject(model, gk.with_ranks(config(RANK), ranks), list(ranks)), steps)
        if name == "DiffoRA":
            return self.by_gates(seed, rate)
        if name == "PRILoRA":
            model = copy.deepcopy(self.base)
            recipes.inject_prilora(model, RANK // 2, 3 * RANK // 2, target_modules=ATTENTION)
            return self.with_recipe(model, recipes.PRILoRA(model), rate)
        model = self.fresh(2 * RANK if name == "LoRA-FA" else RANK)  # it trains half of the factors
        if name in KINDS:
            return Prepared(model, steps, gk.optimizer(model, KINDS[name], rate))
        made: dict[str, Callable[[], recipes.Recipe]] = {
            "BeamLoRA": lambda: recipes.BeamLoRA(model, steps, period=max(steps // 8, 2), horizon=steps, seed=seed),
            "DynamicLoRA": lambda: recipes.DynamicLoRA(model, period=max(steps // 10, 1), until=steps // 2),
            "ChainOfLoRA": lambda: recipes.ChainOfLoRA(model, [steps // 3, 2 * steps // 3]),
        }
        return self.with_recipe(model, made[name](), rate) if name in made else Prepared(model, steps)

    def with_recipe(
        self, model: nn.Module, recipe: recipes.Recipe, rate: float, parameters: list[nn.Parameter] | None = None
    ) -> Prepared:
        trained = parameters or [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
        recipe.bind(optimizer)
        return Prepared(model, self.args.steps, optimizer, recipe)

    def by_gates(self, seed: int, rate: float) -> Prepared:
        """Half of the steps for the gates; then adapters of twice the rank in the better half of the layers."""
        model = self.fresh()
        generator, text = torch.Generator().manual_seed(seed), self.numbers.validation

        def held_out() -> torch.Tensor:
            begins = torch.randint(len(text) - WINDOW, (BATCH, 1), generator=generator)
            return token_loss(model, text[(begins + torch.arange(WINDOW + 1)).to(text.device)])

        gates = recipes.DiffoRA(model, held_out)
        prepared = self.with_recipe(model, gates, rate)
        prepared.steps = self.args.steps // 2
        seconds = self.fit(prepared, seed, rate)
        chosen = gates.chosen(share=0.5)
        torch.manual_seed(seed)
        adapted = gk.inject(copy.deepcopy(self.base), config(2 * RANK), chosen)
        return Prepared(adapted, self.args.steps - prepared.steps, seconds=seconds)

    def fit(self, prepared: Prepared, seed: int, rate: float) -> float:
        """Train; returns the seconds in steps."""

        def after() -> None:
            if prepared.recipe is not None:
                prepared.recipe.after_step()
            self.bar.update()

        run = train(
            prepared.model, self.numbers.training, self.numbers.validation[: WINDOW + 2], steps=prepared.steps,
            batch=BATCH, learning_rate=rate, seed=seed, on_step=after, optimizer=prepared.optimizer,
        )  # fmt: skip
        if prepared.recipe is not None:
            prepared.recipe.finish()
        return run.seconds

    def run(self, name: str, seed: int, rate: float, text: torch.Tensor) -> dict[str, Any]:
        """One training of one method; its loss on a text, also of its merged weights."""
        self.bar.set_description(f"{name}, seed {seed}")
        prepared = self.prepare(name, seed, rate)
        layers = [layer for layer in prepared.model.modules() if isinstance(layer, gk.GLoRALinear)]
        trained = sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
        seconds = self.fit(prepared, seed, rate)
        loss = held_out_loss(prepared.model, text)
        gk.merge(prepared.model)
        merged = held_out_loss(prepared.model.eval(), text)
        if abs(merged - loss) > 1e-3:
            raise RuntimeError(f"{name}: the merged weights have the loss {merged}, the layers {loss}")
        return {
            "loss": loss, "seconds": seconds + prepared.seconds, "trainable": trained,
            "rank": sum(layer.config.rank for layer in layers),
        }  # fmt: skip


KINDS = {"LoRA+": "lora+", "LoRA-FA": "lora-fa", "LoRA-RITE": "rite"}


def summary(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The table: of each method its losses, and the paired difference from the LoRA with as many parameters."""
    rows = []
    for name, own in runs.items():
        losses = [run["loss"] for run in own]
        against = "LoRA, rank 1" if name == "XGBLoRA" else LORA
        paired = ""
        if name not in (LORA, "LoRA, rank 1") and against in runs:
            d = differences(losses, [run["loss"] for run in runs[against]])
            paired = plus_minus(d["mean"], d["standard_error"], len(own), "+.4f")
        seconds = statistics.mean(run["seconds"] for run in own)
        rows.append([name, f"{own[0]['trainable']:,}", spread(losses, ".4f"), paired, f"{seconds:.1f}"])
    return table(["method", "trained at a time", "loss", "− LoRA, paired", "seconds"], rows)


def sweep(study: Study, names: list[str]) -> str:
    """The loss on validation text of each method at each rate, with a seed of its own."""
    rows = []
    for name in names:
        losses = [study.run(name, SWEEP_SEED, rate, study.numbers.validation)["loss"] for rate in CANDIDATES]
        rows.append([name, *(f"{loss:.4f}" for loss in losses)])
    return table(["validation loss at the rate", *map(str, CANDIDATES)], rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Published training methods against LoRA on a small LLaMA, at equal parameters and steps.",
        epilog="Needs: pip install 'glora_kernels[examples,recipes,peft]'. Downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(RATES), default=list(RATES), metavar="METHOD", help="which to run")
    add("--seeds", type=int, default=3, help="runs of each method, with other windows and fresh adapters")
    add("--steps", type=int, default=240, help="steps of each run")
    add("--pretraining-steps", type=int, default=400, help="steps of the base's own training")
    add("--sweep", action="store_true", help="print how the learning rates were chosen, and stop")
    add("--quick", action="store_true", help="one seed and few steps, in less than two minutes")
    add_where(parser, "out/recipes_text", "table, picture and results")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.pretraining_steps = 1, 16, 40
    for name in ("seeds", "steps", "pretraining_steps"):
        value, least = getattr(args, name), 16 if name == "steps" else 1
        need(parser, value >= least, f"--{name.replace('_', '-')}", f"must be at least {least}, got {value}")
    settle_where(parser, args)
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # products this small gain nothing from more, and wait for them on a busy machine
    started = time.perf_counter()
    programs, numbers = load_parts(args.device, args.quick)
    total = args.pretraining_steps + len(args.methods) * (len(CANDIDATES) if args.sweep else args.seeds) * args.steps
    with gk.backend(args.backend), tqdm(total=total, unit="step", desc="pretraining") as bar:
        torch.manual_seed(0)
        base = build_model(WIDTH, DEPTH).to(args.device)
        pretrain(base, programs, args.pretraining_steps, bar.update)
        study = Study(base, numbers, args, bar)
        if args.sweep:
            text = sweep(study, args.methods)
        else:
            before = held_out_loss(base, numbers.test)
            runs = {
                name: [study.run(name, seed, RATES[name], numbers.test) for seed in range(args.seeds)]
                for name in args.methods
            }
    if args.sweep:
        print(text)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - started
    where = machine(args.device)
    title = (
        f"Loss on test text, nats a token, after {args.steps} steps of {BATCH} x {WINDOW} tokens, {args.seeds} seeds; "
        f"the base itself has {before:.4f}"
    )
    text = f"{title}\n\n{summary(runs)}\n\n{', '.join(f'{k} {v}' for k, v in where.items())} ({seconds:.0f} s)"
    (args.out / "table.md").write_text(text + "\n")
    draw_methods(
        {name: [run["loss"] for run in own] for name, own in runs.items()}, LORA, title, args.out / "recipes.png"
    )
    content = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": where, "before": before, "rates": RATES, "seconds": seconds, "methods": runs,
    }  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{text}\n")
    for path in sorted(args.out.iterdir()):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
