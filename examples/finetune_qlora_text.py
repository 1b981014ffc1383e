"""Fine-tune a small LLaMA on a 4-bit base with QLoRA, QShareA and QGLoRA, each beside the same run on the dense base.

    python examples/finetune_qlora_text.py
    python examples/finetune_qlora_text.py --rank 4 --seeds 5

The base learns documentation of Python's standard library about programs, files and protocols, and is frozen. A copy
of it is quantized to NF4 with double quantization. Then LoRA, ShareLoRA (ShareA) and GLoRA adapt both to what the
library says about numbers: on the 4-bit base they are called QLoRA, QShareA and QGLoRA. All get the same windows of
text in the same order, the same number of steps and the same rank. Every run checks that training leaves each byte of
its base as it was. At the end the last QGLoRA adapter is saved, and loaded into a base that is quantized anew.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import glora_kernels as gk
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import workspace

if missing := [name for name in ("matplotlib", "tqdm", "transformers") if find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(missing)}; the examples need: pip install 'glora_kernels[examples]'")

from arguments import plus_minus
from docstring_text import Corpus
from language_model import WINDOW, Run, build_model, held_out_loss, train
from study_plots import LABELS, Rows, draw_four_bit
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

# All multiples of 64, the block size: no block of a weight crosses a row.
WIDTH, INTERMEDIATE, DEPTH = 128, 384, 4
EVALUATIONS = 4

# Of the candidates, the one with the lowest mean loss over the seeds on validation text, which is neither trained
# nor tested on, for QLoRA and QGLoRA; QShareA does as well at twice the rate, within 0.001. `--sweep` repeats the
# comparison, on the NF4 base with the other arguments at their defaults.
LEARNING_RATE = 1e-2
CANDIDATES = [5e-3, 1e-2, 2e-2]


def choose_methods(rank: int) -> dict[str, gk.GLoRAConfig | gk.ShareLoRAConfig]:
    """The three methods by the name they have on a 4-bit base, all with s = alpha/rank = 2.

    LLaMA's layers have no bias for D to scale; C and E give them one.
    """
    alpha = 2 * rank
    return {
        "QLoRA": gk.GLoRAConfig.lora(rank=rank, alpha=alpha),
        "QShareA": gk.ShareLoRAConfig(rank=rank, alpha=alpha, share="A"),
        "QGLoRA": gk.GLoRAConfig(A="vector", B="lora", C="vector", D="none", E="vector", rank=rank, alpha=alpha),
    }


def quantized(base: nn.Module) -> nn.Module:
    """A copy of a dense model, all linear layers but the head in NF4 with double quantization."""
    return gk.quantize(copy.deepcopy(base), "nf4", double_quant=True)


def packed_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The weights of a model's 4-bit layers, by path."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, gk.QuantizedLinear))
    weights = ((name, layer.base_weight()) for name, layer in layers)
    return {name: weight for name, weight in weights if isinstance(weight, QuantizedWeight)}


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


class FineTuning:
    """One frozen base, dense and in 4 bits, and the text it is adapted to."""

    def __init__(self, dense: nn.Module, numbers: Corpus, args: argparse.Namespace) -> None:
        self.dense, self.numbers, self.args = dense, numbers, args
        self.bases = {"dense": dense, "nf4": quantized(dense)}

    def prepare(self, name: str, base: str, seed: int) -> nn.Module:
        """A copy of a base with the method's fresh adapter; a seed gives both bases the same one."""
        torch.manual_seed(seed)
        return gk.inject(copy.deepcopy(self.bases[base]), choose_methods(self.args.rank)[name])

    def adapt(self, name: str, base: str, seed: int, on_step: Callable[[], object]) -> tuple[nn.Module, Run]:
        """Train one method on one base. Raises RuntimeError where that changes the base."""
        model = self.prepare(name, base, seed)
        run = train(
            model,
            self.numbers.training,
            self.numbers.test,
            steps=self.args.steps,
            batch=BATCH,
            learning_rate=LEARNING_RATE,
            seed=seed,
            evaluate_every=math.ceil(self.args.steps / EVALUATIONS),
            on_step=on_step,
        )
        check_frozen(f"{name} on the {LABELS[base]} base", model, self.bases[base])
        return model, run

    def weigh(self) -> Rows:
        """By base: its loss, and the bytes of its linear layers, the head aside; in 4 bits, with all their scales."""
        weights = packed_weights(self.bases["nf4"])
        sizes = {
            "dense": sum(parameter_bytes(self.dense.get_submodule(name)) for name in weights),
            "nf4": sum(weight.nbytes() for weight in weights.values()),
        }
        numbers = sum(weight.numel() for weight in weights.values())
        return {
            base: {
                "loss": held_out_loss(model, self.numbers.test),
                "linear_layers": len(weights),
                "linear_weights": numbers,
                "linear_bytes": sizes[base],
                "bits_per_weight": 8 * sizes[base] / numbers,
                "other_bytes": parameter_bytes(self.dense) - sizes["dense"],
            }
            for base, model in self.bases.items()
        }

    def peak_memory(self, name: str, base: str) -> int:
        """The peak of two training steps, of making the model on: base, adapter, activations, optimizer, workspace."""

        def two_steps() -> None:
            tokens = self.numbers.training
            model = self.prepare(name, base, seed=0)
            # Behind the second step comes an evaluation, here of one window: less than a step.
            train(model, tokens, tokens[: WINDOW + 2], steps=2, batch=BATCH, learning_rate=LEARNING_RATE, seed=0)

        return peak_of(two_steps, torch.device(self.args.device))


def peak_of(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a function holds at once of PyTorch's memory on a device.

    On a GPU as `torch.cuda.max_memory_allocated` has it, less what was allocated before. On a CPU from each allocation
    and release that the profiler sees: the resident set of a process, some hundred MiB of libraries, hides a model
    this small.
    """
    gc.collect()  # what is released while measuring should have been allocated while measuring
    workspace.release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write into the progress bar
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(event["Total Allocated"] for event in memory) - before


def compare(tuning: FineTuning, bar: tqdm) -> tuple[Rows, nn.Module]:
    """Each method on each base with each seed. Returns the rows of the table, and the model trained last."""
    names = list(choose_methods(tuning.args.rank))
    runs: dict[str, dict[str, list[Run]]] = {name: {base: [] for base in LABELS} for name in names}
    for seed in range(tuning.args.seeds):
        for name in names:
            for base in LABELS:
                bar.set_description(f"{name}, {LABELS[base]}, seed {seed}")
                model, run = tuning.adapt(name, base, seed, bar.update)
                runs[name][base].append(run)
    bar.set_description("measuring memory")
    rows = {}
    for name in names:
        differences = [
            four_bit.held_out[-1] - dense.held_out[-1]
            for dense, four_bit in zip(runs[name]["dense"], runs[name]["nf4"], strict=True)
        ]
        rows[name] = {
            "trainable_parameters": gk.trainable_parameters(tuning.prepare(name, "nf4", seed=0)),
            "differences": differences,
            "difference_mean": statistics.mean(differences),
            "difference_std": spread(differences),
        }
        for base in LABELS:
            rows[name][base] = summarize(runs[name][base]) | {"peak_memory_bytes": tuning.peak_memory(name, base)}
    return rows, model


def summarize(runs: list[Run]) -> dict[str, Any]:
    finals = [run.held_out[-1] for run in runs]
    return {
        "loss_mean": statistics.mean(finals),
        "loss_std": spread(finals),
        "seconds_per_step": statistics.mean(run.seconds / run.steps[-1] for run in runs),
        "optimizer_bytes": runs[0].optimizer_bytes,
        "runs": [asdict(run) for run in runs],
    }


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_bases(bases: Rows) -> None:
    dense, four_bit = bases["dense"], bases["nf4"]
    print(
        f"\n{dense['linear_weights']:,} weights in {dense['linear_layers']} linear layers: "
        f"{dense['linear_bytes']:,} bytes dense (fp32), {four_bit['linear_bytes']:,} in NF4 "
        f"({four_bit['bits_per_weight']:.2f} bits a weight, scales included), {ratio(bases):.1f} times less"
    )
    print(f"embeddings, norms and head, {dense['other_bytes']:,} bytes, are dense in both")


def ratio(bases: Rows) -> float:
    return bases["dense"]["linear_bytes"] / bases["nf4"]["linear_bytes"]


def print_table(rows: Rows, bases: Rows, device: str) -> None:
    print(
        f"\n{'':9}{'loss, dense':>17}{'loss, NF4':>17}{'NF4 − dense':>18}{'trainable':>11}"
        f"{'peak memory, MiB*':>19}{'ms/step':>13}"
    )
    before, quantized_before = bases["dense"]["loss"], bases["nf4"]["loss"]
    print(f"{'before':9}{before:>17.4f}{quantized_before:>17.4f}{quantized_before - before:>+18.4f}")
    for name, row in rows.items():
        dense, four_bit = row["dense"], row["nf4"]
        losses = [plus_minus(base["loss_mean"], base["loss_std"], len(base["runs"])) for base in (dense, four_bit)]
        difference = plus_minus(row["difference_mean"], row["difference_std"], len(dense["runs"]), "+.4f")
        memory = " → ".join(f"{base['peak_memory_bytes'] / 2**20:.1f}" for base in (dense, four_bit))
        times = " → ".join(f"{1000 * base['seconds_per_step']:.0f}" for base in (dense, four_bit))
        print(
            f"{name:9}{losses[0]:>17}{losses[1]:>17}{difference:>18}{row['trainable_parameters']:>11,}"
            f"{memory:>19}{times:>13}"
        )
    print("loss: nats a token on held-out text about numbers; ± standard deviation over the seeds; dense → NF4")
    if device == "cuda":
        print("* torch.cuda.max_memory_allocated over two training steps: base, adapter, activations, optimizer")
    else:
        print("* of PyTorch's allocator over two training steps (profiler): base, adapter, activations, optimizer")


def check_saved(model: nn.Module, tuning: FineTuning, path: Path) -> float:
    """Save the adapter, load it into the base quantized anew, and return the loss that it gives; or RuntimeError."""
    loss = held_out_loss(model, tuning.numbers.test)
    gk.save_adapter(model, path)
    check_reload("QGLoRA", quantized(tuning.dense), path, tuning.numbers.test, loss)
    return loss


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small LLaMA in NF4 with QLoRA, QShareA and QGLoRA, and the dense one alike.",
        epilog="Needs: pip install 'glora_kernels[examples]'. Downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, seeds=3, steps=50, pretraining_steps=300, out="out/qlora")
    parser.add_argument(
        "--smoke", action="store_true", help="one seed, few steps and half the depth, to see that everything works"
    )
    return parser


def main() -> None:
    args = parse_arguments(build_parser(), WIDTH)
    if args.smoke:
        args.seeds, args.steps, args.pretraining_steps = 1, 6, 12
    started = time.perf_counter()
    torch.set_num_threads(1)  # products this small gain nothing from more, and wait for them on a busy machine
    if not args.sweep:
        args.out.mkdir(parents=True, exist_ok=True)
    figure, results, adapter = (args.out / name for name in ("four_bit.png", "results.json", "qglora.safetensors"))

    programs, numbers = load_parts(args.device, args.smoke)
    methods = choose_methods(args.rank)
    trainings = len(methods) * args.seeds * len(CANDIDATES if args.sweep else LABELS)
    total = args.pretraining_steps + trainings * args.steps
    with gk.backend(args.backend), tqdm(total=total, unit="step", desc="pretraining") as bar:
        torch.manual_seed(0)
        dense = build_model(WIDTH, 2 if args.smoke else DEPTH, INTERMEDIATE).to(args.device)
        pretraining = pretrain(dense, programs, args.pretraining_steps, bar.update)
        tuning = FineTuning(dense, numbers, args)
        if args.sweep:
            table = sweep(methods, lambda name, seed: tuning.prepare(name, "nf4", seed), numbers, CANDIDATES, args, bar)
        else:
            bases = tuning.weigh()
            rows, model = compare(tuning, bar)
            reloaded = check_saved(model, tuning, adapter)
    if args.sweep:
        print(table)
        return

    print_text(programs, numbers, pretraining, args)
    print_bases(bases)
    print_table(rows, bases, args.device)
    print("\nchecked: training left every byte of both bases as it was, codes and scales included")
    print(
        f"checked: the saved QGLoRA adapter, loaded into a base quantized anew, gives its loss exactly ({reloaded:.4f})"
    )
    title = f"Programs → numbers at rank {args.rank}, dense and NF4 base (mean and range of {count_seeds(args)})"
    draw_four_bit(rows, bases, title, figure)
    content = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "learning_rate": LEARNING_RATE,
        "pretraining": asdict(pretraining),
        "bases": bases,
        "methods": rows,
        "reloaded_loss": reloaded,
    }
    results.write_text(json.dumps(content, indent=2) + "\n")
    print("\n" + "\n".join(f"wrote {path}" for path in (figure, results, adapter)))
    print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
