"""Fine-tune a small vision transformer from the handwritten digits 0-4 to 5-9: linear probe, LoRA and GLoRA.

    python examples/finetune_digits.py
    python examples/finetune_digits.py --model small --rank 8 --supports vector,lora,vector,none,vector

The transformer is trained on the classes 0 to 4 of scikit-learn's scanned digits and frozen. Then each
method learns the classes 5 to 9 from a few scans a class. All get the same scans, batches, fresh head and
number of steps, and are tested on scans that no training and no choice has seen. At the end the last GLoRA
model is merged, unmerged, saved and loaded again, and what that changes is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from arguments import add_where, need, plus_minus, settle_where
from digits_model import (
    LINEARS,
    SIZES,
    Pictures,
    Run,
    VisionTransformer,
    accuracy,
    load_pictures,
    predict,
    split,
    train,
)
from torch import Tensor, nn

import glora_kernels as gk

if missing := [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(missing)}; the examples need: pip install 'glora_kernels[examples]'")

from tqdm import tqdm

# Of the candidates, those with the highest mean validation accuracy over the seeds, on scans that are neither
# trained nor tested on, with the other arguments at their defaults: `--sweep` repeats the comparison.
LEARNING_RATES = {"linear probe": 3e-1, "LoRA": 1e-2, "GLoRA": 3e-2}
CANDIDATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
COLORS = {"linear probe": "#777777", "LoRA": "#0072B2", "GLoRA": "#D55E00"}

Rows = dict[str, dict[str, Any]]
"""The results by method: one row of the table each, and the curves."""


@dataclass(frozen=True)
class Method:
    """A way to adapt the pretrained model; without a configuration, only the head is trained."""

    name: str
    config: gk.GLoRAConfig | None

    def prepare(self, pretrained: VisionTransformer, seed: int) -> nn.Module:
        """A copy of the pretrained model with a fresh head and the method's adapters, all else frozen."""
        torch.manual_seed(seed)
        model = copy.deepcopy(pretrained)
        model.head.reset_parameters()
        if self.config is not None:
            return gk.inject(model, self.config, target_modules=LINEARS, train=["head"])
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model


def choose_methods(width: int, rank: int, supports: dict[str, Any]) -> list[Method]:
    """The three methods. GLoRA gets the rank whose number of parameters is nearest to LoRA's."""
    layers = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]

    def count(config: gk.GLoRAConfig) -> int:
        return sum(config.num_parameters(inputs, outputs) for inputs, outputs in layers)

    lora = gk.GLoRAConfig.lora(rank=rank, alpha=2 * rank)
    candidates = [gk.GLoRAConfig(**supports, rank=r) for r in range(1, 4 * rank + 1)]
    glora = min(candidates, key=lambda config: abs(count(config) - count(lora)))
    return [Method("linear probe", None), Method("LoRA", lora), Method("GLoRA", glora)]


def compare(
    methods: list[Method],
    pretrained: VisionTransformer,
    pool: Pictures,
    test: Pictures,
    args: argparse.Namespace,
    bar: tqdm,
) -> tuple[Rows, nn.Module]:
    """Train each method with each seed. Returns the results and the model trained last."""
    runs: dict[str, list[Run]] = {method.name: [] for method in methods}
    parameters = {}
    for seed in range(args.seeds):
        training, _ = split(pool, args.per_class, seed)
        for method in methods:
            bar.set_description(f"{method.name}, seed {seed}")
            model = method.prepare(pretrained, seed)
            parameters[method.name] = gk.trainable_parameters(model)
            run = train(
                model,
                training,
                test,
                steps=args.steps,
                learning_rate=LEARNING_RATES[method.name],
                seed=seed,
                evaluate_every=max(1, args.steps // 20),
                on_step=bar.update,
            )
            runs[method.name].append(run)
    return {name: summarize(of_method, parameters[name]) for name, of_method in runs.items()}, model


def summarize(runs: list[Run], parameters: int) -> dict[str, Any]:
    finals = [run.accuracies[-1] for run in runs]
    return {
        "accuracy_mean": statistics.mean(finals),
        "accuracy_std": statistics.stdev(finals) if len(finals) > 1 else 0.0,
        "trainable_parameters": parameters,
        "seconds_per_run": statistics.mean(run.seconds for run in runs),
        "peak_memory_bytes": max(run.memory_bytes for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def sweep(
    methods: list[Method], pretrained: VisionTransformer, pool: Pictures, args: argparse.Namespace, bar: tqdm
) -> str:
    """The mean validation accuracy of each method at each candidate rate: how LEARNING_RATES was chosen."""
    lines = ["mean validation accuracy, %", f"{'learning rate':14}" + "".join(f"{r:>8g}" for r in CANDIDATES)]
    for method in methods:
        means = []
        for rate in CANDIDATES:
            bar.set_description(f"{method.name}, rate {rate:g}")
            finals = []
            for seed in range(args.seeds):
                training, validation = split(pool, args.per_class, seed)
                model = method.prepare(pretrained, seed)
                run = train(
                    model,
                    training,
                    validation,
                    steps=args.steps,
                    learning_rate=rate,
                    seed=seed,
                    on_step=bar.update,
                )
                finals.append(run.accuracies[-1])
            means.append(statistics.mean(finals))
        lines.append(f"{method.name:14}" + "".join(f"{100 * mean:8.1f}" for mean in means))
    return "\n".join(lines)


def check_merge(model: nn.Module, pretrained: nn.Module, scans: Tensor) -> dict[str, Any]:
    """Merge and unmerge: the largest change of a logit, and whether every frozen weight came back exactly."""
    before = predict(model, scans)
    gk.merge(model)
    merged = predict(model, scans)
    gk.unmerge(model)
    weights = model.state_dict()
    frozen = {name: value for name, value in pretrained.state_dict().items() if not name.startswith("head.")}
    return {
        "largest_logit": before.abs().max().item(),
        "merge_largest_logit_change": (merged - before).abs().max().item(),
        "unmerge_restores_base": all(torch.equal(weights[name], value) for name, value in frozen.items()),
    }


def check_reload(model: nn.Module, pretrained: nn.Module, scans: Tensor, path: Path) -> dict[str, Any]:
    """Save the adapter, load it into a plain copy of the pretrained model, and compare the logits."""
    gk.save_adapter(model, path)
    reloaded = copy.deepcopy(pretrained)
    gk.load_adapter(reloaded, path)
    equal = torch.equal(predict(model, scans), predict(reloaded, scans))
    return {"adapter_kib": path.stat().st_size / 1024, "reload_logits_equal": equal}


def print_table(rows: Rows, device: torch.device) -> None:
    print(f"\n{'method':14}{'accuracy, %':>14}{'trainable':>12}{'seconds/run':>14}{'peak memory, KiB*':>20}")
    for name, row in rows.items():
        spread = plus_minus(100 * row["accuracy_mean"], 100 * row["accuracy_std"], len(row["runs"]), ".1f")
        print(
            f"{name:14}{spread:>14}{row['trainable_parameters']:>12,}{row['seconds_per_run']:>14.1f}"
            f"{row['peak_memory_bytes'] / 1024:>20,.0f}"
        )
    print("± standard deviation over the seeds")
    if device.type == "cuda":
        print("* torch.cuda.max_memory_allocated during training")
    else:
        print("* counted as backward begins: weights, gradients, optimizer state, saved activations")


def print_checks(checks: dict[str, Any]) -> None:
    change, largest = checks["merge_largest_logit_change"], checks["largest_logit"]
    print("\nthe GLoRA model trained last, on the test scans:")
    print(f"  merged    largest change of a logit {change:.1e} (the largest logit is {largest:.1f})")
    print(f"  unmerged  frozen weights as before, bit for bit: {checks['unmerge_restores_base']}")
    print(f"  saved     {checks['adapter_kib']:.1f} KiB with its head and configuration")
    print(f"  reloaded  into the plain pretrained model, logits equal: {checks['reload_logits_equal']}")


def draw_curves(rows: Rows, title: str, path: Path) -> None:
    """Test accuracy and training loss by step: means over the seeds, in bands from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, row in rows.items():
        label = f"{name}: {100 * row['accuracy_mean']:.1f} %, {row['trainable_parameters']:,} parameters"
        for panel, key, factor in zip(panels, ("accuracies", "losses"), (100, 1), strict=True):
            steps = row["runs"][0]["steps"]
            curves = factor * torch.tensor([run[key] for run in row["runs"]])
            panel.plot(steps, curves.mean(0), color=COLORS[name], label=label, linewidth=2)
            panel.fill_between(steps, curves.amin(0), curves.amax(0), color=COLORS[name], alpha=0.2, linewidth=0)
    for panel, text in zip(panels, ("test accuracy, %", "training loss"), strict=True):
        panel.set_xlabel("step")
        panel.set_ylabel(text)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[1].yaxis.set_minor_formatter(ticker.NullFormatter())
    panels[0].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Adapt a small vision transformer from the digits 0-4 to 5-9: linear probe, LoRA, GLoRA.",
        epilog="Needs: pip install 'glora_kernels[examples]'",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=SIZES, default="tiny", help="size of the transformer")
    add("--rank", type=int, default=4, help="rank of LoRA; GLoRA's follows, for a like number of parameters")
    add(
        "--supports",
        default="vector,lora,none,none,vector",
        metavar="A,B,C,D,E",
        help="form of each GLoRA support: lora, vector, constant or none",
    )
    add_where(parser, "out/digits", "curves, results and adapter")
    add("--seeds", type=int, default=3, help="trainings of each method")
    add("--steps", type=int, default=200, help="steps of each training, up to 50 scans a step")
    add("--per-class", type=int, default=40, help="scans of each class 5-9 to learn from, at most 80")
    add("--quick", action="store_true", help="one seed and 40 steps, to see that everything works")
    add("--sweep", action="store_true", help="print how the learning rates were chosen, and stop")
    args = parser.parse_args()

    forms = [form.strip() for form in args.supports.split(",")]
    need(parser, len(forms) == 5, "--supports", f"give five forms, A,B,C,D,E, with commas; got {args.supports!r}")
    args.supports = dict(zip("ABCDE", forms, strict=True))
    try:
        gk.GLoRAConfig(**args.supports)
    except ValueError as error:
        parser.error(f"argument --supports: {error}")
    need(parser, args.rank >= 1, "--rank", f"must be at least 1, got {args.rank}")
    need(parser, args.seeds >= 1, "--seeds", f"must be at least 1, got {args.seeds}")
    need(parser, args.steps >= 1, "--steps", f"must be at least 1, got {args.steps}")
    need(parser, 1 <= args.per_class <= 80, "--per-class", f"must be from 1 to 80, got {args.per_class}")
    settle_where(parser, args)
    if args.quick:
        args.seeds, args.steps = 1, 40
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    torch.set_num_threads(1)  # products this small gain nothing from more, and wait for them on a busy machine
    width, depth, heads = SIZES[args.model]
    methods = choose_methods(width, args.rank, args.supports)
    if not args.sweep:
        args.out.mkdir(parents=True, exist_ok=True)
    curves, results, adapter = (
        args.out / "curves.png",
        args.out / "results.json",
        args.out / "glora.safetensors",
    )

    # The classes 0-4 for pretraining; of 5-9, one test set, and a pool from which each seed draws its scans.
    source, source_test = split(load_pictures(range(0, 5), device), per_class=140, seed=0)
    test, pool = split(load_pictures(range(5, 10), device), per_class=80, seed=0)

    pretraining_steps = 100 if args.quick else 400
    trainings = len(methods) * args.seeds * (len(CANDIDATES) if args.sweep else 1)
    total = pretraining_steps + trainings * args.steps
    with gk.backend(args.backend), tqdm(total=total, unit="step", desc="pretraining on 0-4") as bar:
        torch.manual_seed(0)
        pretrained = VisionTransformer(width, depth, heads, classes=5).to(device)
        train(
            pretrained,
            source,
            source_test,
            steps=pretraining_steps,
            learning_rate=2e-3,
            seed=0,
            on_step=bar.update,
        )
        if args.sweep:
            table = sweep(methods, pretrained, pool, args, bar)
        else:
            rows, model = compare(methods, pretrained, pool, test, args, bar)
            checks = check_merge(model, pretrained, test[0])
            checks |= check_reload(model, pretrained, test[0], adapter)
    if args.sweep:
        print(table)
        return

    known = accuracy(pretrained, source_test)
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"
    print(f"\npretrained on 0-4: {100 * known:.1f} % of {len(source_test[1])} held-out scans")
    print(
        f"adapted to 5-9: {args.per_class} scans a class to learn from, {len(test[1])} scans to test, "
        f"{args.steps} steps, {seeds}"
    )
    print_table(rows, device)
    print_checks(checks)
    title = f"Digits 0-4 → 5-9, {args.per_class} scans a class ({args.model} model, mean and range of {seeds})"
    draw_curves(rows, title, curves)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    content = {"settings": settings, "pretrained_accuracy": known, "methods": rows, "checks": checks}
    results.write_text(json.dumps(content, indent=2) + "\n")
    print("\n" + "\n".join(f"wrote {path}" for path in (curves, results, adapter)))


if __name__ == "__main__":
    main()
