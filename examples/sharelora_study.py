"""Adapt a small LLaMA to another kind of text with LoRA, ShareA, ShareB, ShareAB and Share-qkv at equal rank.

    python examples/sharelora_study.py
    python examples/sharelora_study.py --rank 4 --seeds 5

The text is documentation of Python's standard library. The model is trained for about a minute on what it says
about programs, files and protocols, and frozen; then each method adapts it to what the library says about numbers.
All get the same windows of text in the same order, the same number of steps and the same rank, and are tested on
documentation that no training and no choice has seen. Every run checks that a fresh adapter changes nothing, that
training leaves each byte of the base as it was, and that the saved adapter, loaded into the base again, gives the
same loss exactly.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import glora_kernels as gk

if missing := [name for name in ("matplotlib", "tqdm", "transformers") if find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(missing)}; the examples need: pip install 'glora_kernels[examples]'")

from arguments import plus_minus
from docstring_text import Corpus, entropy
from language_model import WINDOW, Run, build_model, held_out_loss, train
from study_plots import Rows, draw_comparison, draw_spectra
from text_study import (
    BATCH,
    add_arguments,
    check_frozen,
    check_reload,
    count_seeds,
    load_parts,
    parse_arguments,
    pretrain,
    print_text,
    sweep,
)
from tqdm import tqdm

WIDTH, DEPTH = 96, 4
QKV = ("q_proj", "k_proj", "v_proj")

# Of the candidates, the one with the lowest mean loss over the seeds on validation text, which is neither trained
# nor tested on, with the other arguments at their defaults. It is the same for all five methods, so they share one
# rate: `--sweep` repeats the comparison.
LEARNING_RATE = 1e-2
CANDIDATES = [5e-3, 1e-2, 2e-2]

SPECTRA = ["LoRA", "ShareA"]
SHARE_OF_SQUARES = 0.9


def choose_methods(rank: int) -> dict[str, gk.GLoRAConfig | gk.ShareLoRAConfig]:
    """The five methods by name, all with s = alpha/rank = 2."""
    alpha = 2 * rank
    return {
        "LoRA": gk.GLoRAConfig.lora(rank=rank, alpha=alpha),
        "ShareA": gk.ShareLoRAConfig(rank=rank, alpha=alpha, share="A"),
        "ShareB": gk.ShareLoRAConfig(rank=rank, alpha=alpha, share="B"),
        "ShareAB": gk.ShareLoRAConfig(rank=rank, alpha=alpha, share="AB"),
        "Share-qkv": gk.ShareLoRAConfig(rank=rank, alpha=alpha, share="A", projections=QKV),
    }


@dataclass
class Result:
    """One adapted model: its training, what it costs, and the singular values of its layers' updates."""

    run: Run
    parameters: int
    adapter_bytes: int
    fresh_change: float
    spectrum: Tensor


class Study:
    """A frozen base and the text it is adapted to; one call of `adapt` is one run of one method."""

    def __init__(self, base: nn.Module, numbers: Corpus, args: argparse.Namespace) -> None:
        self.base, self.numbers, self.args = base, numbers, args

    def prepare(self, name: str, seed: int) -> nn.Module:
        """A copy of the base with the method's fresh adapter, all else frozen."""
        torch.manual_seed(seed)
        return gk.inject(copy.deepcopy(self.base), choose_methods(self.args.rank)[name])

    def adapt(self, name: str, seed: int, path: Path, on_step: Callable[[], object]) -> Result:
        """Train one method, save its adapter to `path`, and check it.

        Raises:
            RuntimeError: the fresh adapter changes a logit on the CPU, training changes the base, or the saved
                adapter does not give the loss again.
        """
        model = self.prepare(name, seed)
        change = self.largest_change(model)
        # Another kernel than the base's may round otherwise; the CPU adds exact zeros to the same product.
        if change and self.numbers.test.device.type == "cpu":
            raise RuntimeError(f"{name}: the fresh adapter changes a logit by {change:.1e}")
        run = train(
            model,
            self.numbers.training,
            self.numbers.test,
            steps=self.args.steps,
            batch=BATCH,
            learning_rate=LEARNING_RATE,
            seed=seed,
            evaluate_every=math.ceil(self.args.steps / 5),
            on_step=on_step,
        )
        check_frozen(name, model, self.base)
        gk.save_adapter(model, path)
        check_reload(name, copy.deepcopy(self.base), path, self.numbers.test, run.held_out[-1])
        return Result(run, gk.trainable_parameters(model), path.stat().st_size, change, update_spectrum(model))

    @torch.no_grad()
    def largest_change(self, model: nn.Module) -> float:
        """The largest difference between a logit of `model` and the base's, over the first test tokens."""
        tokens = self.numbers.test[: 8 * WINDOW].view(8, WINDOW)
        return (model(input_ids=tokens).logits - self.base(input_ids=tokens).logits).abs().max().item()


@torch.no_grad()
def update_spectrum(model: nn.Module) -> Tensor:
    """The singular values of ΔW = s·B_up·B_down of each layer, in falling order: (layers, rank)."""
    rows = []
    for layer in model.modules():
        if isinstance(layer, gk.GLoRALinear):
            factors = layer.adapter()
            update = layer.config.scale * (factors["B_up"].double() @ factors["B_down"].double())
            rows.append(torch.linalg.svdvals(update.cpu())[: layer.config.rank])
    return torch.stack(rows)


def values_needed(spectrum: Tensor) -> Tensor:
    """How many singular values of each layer carry `SHARE_OF_SQUARES` of the sum of their squares: (layers,)."""
    carried = spectrum.square().cumsum(1) / spectrum.square().sum(1, keepdim=True)
    return 1 + (carried < SHARE_OF_SQUARES).sum(1)


def compare(study: Study, bar: tqdm) -> tuple[Rows, dict[str, Tensor]]:
    """Each method with each seed. Returns the rows of the table, and the first seed's spectra."""
    results: dict[str, list[Result]] = {name: [] for name in choose_methods(study.args.rank)}
    for seed in range(study.args.seeds):
        for name, done in results.items():
            bar.set_description(f"{name}, seed {seed}")
            done.append(study.adapt(name, seed, adapter_path(study.args.out, name), bar.update))
    rows = {name: summarize(done) for name, done in results.items()}
    return rows, {name: results[name][0].spectrum for name in SPECTRA}


def summarize(results: list[Result]) -> dict[str, Any]:
    finals = [result.run.held_out[-1] for result in results]
    needed = torch.cat([values_needed(result.spectrum) for result in results])
    return {
        "loss_mean": statistics.mean(finals),
        "loss_std": statistics.stdev(finals) if len(finals) > 1 else 0.0,
        "trainable_parameters": results[0].parameters,
        "optimizer_bytes": results[0].run.optimizer_bytes,
        "adapter_bytes": results[0].adapter_bytes,
        "seconds_per_run": statistics.mean(result.run.seconds for result in results),
        "largest_fresh_change": max(result.fresh_change for result in results),
        "singular_values_needed_median": needed.double().quantile(0.5).item(),
        "singular_values_needed_mean": needed.double().mean().item(),
        "singular_values_needed_by_layer": needed.tolist(),
        "runs": [asdict(result.run) for result in results],
    }


def adapter_path(folder: Path, name: str) -> Path:
    return folder / f"{name.lower()}.safetensors"


def print_table(rows: Rows, loss_before: float) -> None:
    print(
        f"\n{'method':11}{'loss before':>12}{'loss after':>18}{'trainable':>11}{'optimizer, B':>14}"
        f"{'adapter file, B':>17}{'seconds/run':>13}"
    )
    for name, row in rows.items():
        after = plus_minus(row["loss_mean"], row["loss_std"], len(row["runs"]))
        print(
            f"{name:11}{loss_before:12.4f}{after:>18}{row['trainable_parameters']:>11,}{row['optimizer_bytes']:>14,}"
            f"{row['adapter_bytes']:>17,}{row['seconds_per_run']:>13.1f}"
        )
    print("loss: nats a token on held-out text about numbers; ± standard deviation over the seeds")


def print_spectra(rows: Rows, rank: int) -> None:
    print(f"\nsingular values of ΔW, of {rank}, that carry {SHARE_OF_SQUARES:.0%} of the sum of their squares:")
    for name, row in rows.items():
        median, mean = row["singular_values_needed_median"], row["singular_values_needed_mean"]
        print(f"  {name:11}{median:g} in the median layer, {mean:.2f} on average")


def print_checks(rows: Rows) -> None:
    change = max(row["largest_fresh_change"] for row in rows.values())
    runs = sum(len(row["runs"]) for row in rows.values())
    print(f"\nchecked in each of {runs} runs:")
    print(f"  a fresh adapter changes no logit of the base by more than {change:g}")
    print("  training left every byte of the base as it was")
    print("  the saved adapter, loaded into the base, gives the same held-out loss exactly")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Adapt a small LLaMA to other text with LoRA, ShareA, ShareB, ShareAB and Share-qkv at equal rank.",
        epilog="Needs: pip install 'glora_kernels[examples]'. Downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, seeds=3, steps=100, pretraining_steps=500, out="out/sharelora")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that everything works")
    return parser


def main() -> None:
    args = parse_arguments(build_parser(), WIDTH)
    if args.quick:
        args.seeds, args.steps, args.pretraining_steps = 1, 10, 15
    started = time.perf_counter()
    torch.set_num_threads(1)  # products this small gain nothing from more, and wait for them on a busy machine
    if not args.sweep:
        args.out.mkdir(parents=True, exist_ok=True)
    comparison, spectra_png, results = (args.out / name for name in ("comparison.png", "spectra.png", "results.json"))

    programs, numbers = load_parts(args.device, args.quick)
    trainings = len(choose_methods(args.rank)) * args.seeds * (len(CANDIDATES) if args.sweep else 1)
    total = args.pretraining_steps + trainings * args.steps
    with gk.backend(args.backend), tqdm(total=total, unit="step", desc="pretraining") as bar:
        torch.manual_seed(0)
        base = build_model(WIDTH, DEPTH).to(args.device)
        pretraining = pretrain(base, programs, args.pretraining_steps, bar.update)
        loss_before = held_out_loss(base, numbers.test)
        study = Study(base, numbers, args)
        if args.sweep:
            table = sweep(choose_methods(args.rank), study.prepare, numbers, CANDIDATES, args, bar)
        else:
            rows, spectra = compare(study, bar)
    if args.sweep:
        print(table)
        return

    print_text(programs, numbers, pretraining, args)
    print_table(rows, loss_before)
    print_spectra(rows, args.rank)
    print_checks(rows)
    title = f"Programs → numbers at rank {args.rank} (mean and range of {count_seeds(args)})"
    draw_comparison(rows, loss_before, title, comparison)
    title = f"Singular values of each layer's update ΔW = s·B_up·B_down (rank {args.rank}, first seed)"
    draw_spectra(spectra, title, spectra_png)
    content = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "learning_rate": LEARNING_RATE,
        "pretraining": asdict(pretraining) | {"token_frequencies_loss": entropy(programs.test)},
        "loss_before": loss_before,
        "token_frequencies_loss": entropy(numbers.test),
        "methods": rows,
        "spectra": {name: values.tolist() for name, values in spectra.items()},
    }
    results.write_text(json.dumps(content, indent=2) + "\n")
    adapters = [adapter_path(args.out, name) for name in rows]
    print("\n" + "\n".join(f"wrote {path}" for path in (comparison, spectra_png, results, *adapters)))
    print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
