"""Structure search on a small vision transformer: a planted teacher, the digits 5-9, and what trains a supernet well.

    python examples/search_digits.py                       # all sections: each below ten minutes on one core
    python examples/search_digits.py --sections teacher --quick

A transformer is trained on the digits 0 to 4 of scikit-learn's scanned digits and frozen.

teacher      Four layers of a copy are changed by known forms. Students match its features within its number of
             parameters: the forms themselves (the oracle), hand-picked ones, and those that a search finds.
comparison   LoRA, a hand-picked GLoRA, a random and the searched configuration learn the digits 5 to 9.
sampling     The mean accuracy of random configurations of a supernet: one a batch against one an example.

All get the same scans and batches. In the comparison the searched one has as many steps as the others in all, half for
its supernet and half for training its best candidates on; of the teachers' students it is the configurations that are
compared, each trained as long, and the search is what it costs beside. Scans are of three kinds: to train on, to choose
by (the search sees only these), and to test on, which nothing has seen. Every run is reported.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels.search import Candidate

if missing := [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(missing)}; the examples need: pip install 'glora_kernels[examples]'")

from arguments import plus_minus
from digits_model import LINEARS, SIZES, Pictures, VisionTransformer, accuracy, load_pictures, predict, split, train
from search_study import (
    Budget,
    Sampled,
    add_arguments,
    differences,
    forms_of,
    parse_arguments,
    search_and_finish,
    show,
    spread,
    table,
    write,
)
from tqdm import tqdm

SECTIONS = ("teacher", "comparison", "sampling")
WIDTH, DEPTH, HEADS = SIZES["tiny"]
ATTENTION = ("q", "k", "v", "proj")
LORA, SEARCHED, ALONE = "LoRA", "searched", "searched, alone"
ORACLE = "oracle"

# Those of LoRA and GLoRA are what finetune_digits.py chose; all others are LoRA's, and were not tuned.
TEACHER_RATE = 1e-2
RATES = {LORA: 1e-2, "GLoRA": 3e-2, "random": 1e-2, ALONE: 1e-2, SEARCHED: 1e-2}
SUPERNET_RATE = 1e-2

TEACHER_SPACE = gk.SearchSpace(C=("none", "vector"), ranks=(1, 2, 4))
SWITCH_OFF = 0.5
"""How often training leaves a layer of the supernet alone; the search does so as often."""

SPACE = gk.SearchSpace(C=("none", "vector"), ranks=(1, 3, 4, 8), scale=2.0)
LORA_4 = gk.GLoRAConfig.lora(rank=4, alpha=8)
GLORA_3 = gk.GLoRAConfig("vector", "lora", "none", "none", "vector", rank=3, alpha=6)
LIMIT = DEPTH * sum(LORA_4.num_parameters(*shape) for shape in 4 * [(WIDTH, WIDTH)] + 2 * [(WIDTH, 4 * WIDTH)])
"""LoRA's parameters, which are those of this GLoRA as well."""

PER: tuple[Literal["row", "batch"], ...] = ("row", "batch")
KNOWN = (
    gk.GLoRAConfig("none", "lora", "none", "none", "none", rank=4),
    gk.GLoRAConfig("lora", "none", "none", "none", "none", rank=2),
    gk.GLoRAConfig("vector", "none", "vector", "none", "vector"),
)
KNOWN_IN_MLP = gk.GLoRAConfig("none", "lora", "none", "none", "none", rank=2)
"""The forms of a teacher's layers: three of attention, one of an MLP; 800 parameters together."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything is run."""

    teachers: int
    student: Budget
    comparison: Budget
    sampling_steps: int
    pretraining_steps: int
    subnets: int = 24


SIZES_BY_NAME = {
    "full": Sizes(5, Budget(400, 200, 4, 400, 30, 9), Budget(300, 150, 2, 75, 25, 7), 300, 400),
    "quick": Sizes(1, Budget(60, 30, 2, 60, 15, 3), Budget(60, 30, 2, 15, 10, 3), 30, 150),
    "smoke": Sizes(1, Budget(4, 2, 2, 4, 6, 1), Budget(4, 2, 2, 1, 4, 1), 2, 10, 4),
}


def layers(blocks: Iterable[int], names: Iterable[str], config: gk.GLoRAConfig) -> Candidate:
    """One configuration for these linear layers of these blocks."""
    return {f"blocks.{block}.{name}": config for block in blocks for name in names}


def lora(rank: int) -> gk.GLoRAConfig:
    return gk.GLoRAConfig.lora(rank=rank, alpha=rank)


EVERY = range(DEPTH)
HAND_PICKED = {
    "LoRA q v": layers(EVERY, ("q", "v"), lora(2)),
    "LoRA attention": layers(EVERY, ATTENTION, lora(1)),
    "LoRA last block": layers([DEPTH - 1], LINEARS, lora(1)),
    "full GLoRA v": layers(EVERY, ["v"], gk.GLoRAConfig("lora", "lora", "vector", "vector", "vector", rank=1)),
    "vectors": layers(EVERY, ATTENTION, gk.GLoRAConfig("vector", "none", "none", "none", "vector")),
}
"""What the students of a teacher get by hand: 576 to 768 parameters."""


class Planted:
    """A teacher, and the students that match its features.

    An error is the mean squared difference from the teacher's features over that of the base: 1 is an unadapted one.
    """

    def __init__(self, pretrained: VisionTransformer, seed: int) -> None:
        self.base: nn.Module = copy.deepcopy(pretrained)
        self.base.add_module("head", nn.Identity())
        self.known = choose_layers(seed)
        teacher = gk.inject(copy.deepcopy(self.base), dict(self.known), list(self.known))
        plant(teacher, seed)
        scans, labels = load_pictures(range(10), pretrained.positions.device)
        training, rest = split((scans, labels), per_class=100, seed=seed)
        validation, test = split(rest, per_class=30, seed=seed)
        parts = [(part[0], predict(teacher, part[0])) for part in (training, validation, test)]
        self.training, self.validation, self.test = parts
        self.change = (predict(self.base, validation[0]) - self.validation[1]).square().mean().item()

    def error(self, model: nn.Module, pictures: Pictures) -> float:
        return self.loss(predict(model, pictures[0]), pictures[1]).item()

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(features, target) / self.change

    def student(self, candidate: Candidate, seed: int) -> nn.Module:
        """A copy of the base with fresh adapters."""
        torch.manual_seed(seed)
        return gk.inject(copy.deepcopy(self.base), dict(candidate), list(candidate))

    def fit(self, model: nn.Module, steps: int, seed: int, on_step: Callable[[], object]) -> None:
        train(
            model,
            self.training,
            self.validation,
            steps=steps,
            learning_rate=TEACHER_RATE,
            seed=seed,
            on_step=on_step,
            loss_of=self.loss,
            score=self.error,
        )


def choose_layers(seed: int) -> Candidate:
    """Which layers a teacher changes, and by which forms."""
    drawn = random.Random(seed)
    attention = drawn.sample(list(layers(EVERY, ATTENTION, KNOWN_IN_MLP)), len(KNOWN))
    mlp = drawn.choice(list(layers(EVERY, ("fc1", "fc2"), KNOWN_IN_MLP)))
    return {**dict(zip(attention, KNOWN, strict=True)), mlp: KNOWN_IN_MLP}


@torch.no_grad()
def plant(teacher: nn.Module, seed: int) -> None:
    """Random values: a vector changes by about 0.3, a low-rank support its weight by about half."""
    generator = torch.Generator().manual_seed(seed)
    for layer in teacher.modules():
        if isinstance(layer, gk.GLoRALinear):
            size = {"A_up": 1.0, "B_up": layer.weight.square().mean().sqrt().item()}
            for name, parameter in layer.adapter().items():
                factor = 0.3 if name in "ABCDE" else 0.5 * size.get(name, 2.0) / layer.config.rank**0.5
                factor = 1.0 if name.endswith("_down") else factor
                parameter.copy_(factor * torch.randn(parameter.shape, generator=generator))


def run_teachers(
    pretrained: VisionTransformer, sizes: Sizes, args: argparse.Namespace, bar: tqdm
) -> tuple[list[dict[str, Any]], str]:
    """Each teacher and each of its students. Returns the results, and the table."""
    budget = sizes.student
    runs: list[dict[str, Any]] = []
    for seed in range(args.first_seed, args.first_seed + sizes.teachers):
        planted = Planted(pretrained, seed)
        limit = gk.trainable_parameters(planted.student(planted.known, seed))
        errors = {}
        for name, candidate in {ORACLE: planted.known, **HAND_PICKED}.items():
            bar.set_description(f"teacher {seed}, {name}")
            student = planted.student(candidate, seed)
            planted.fit(student, budget.steps, seed, bar.update)
            errors[name] = planted.error(student, planted.test)
        bar.set_description(f"teacher {seed}, {SEARCHED}")
        torch.manual_seed(seed)
        net = gk.Supernet(copy.deepcopy(planted.base), TEACHER_SPACE, LINEARS, seed=seed)
        sampled = Sampled(net, switch_off=SWITCH_OFF, max_parameters=limit)
        planted.fit(sampled, budget.supernet_steps, seed, bar.update)
        found = search_and_finish(
            net,
            partial(planted.error, pictures=planted.validation),
            partial(planted.fit, steps=budget.retraining_steps, seed=seed, on_step=bar.update),
            budget,
            seed,
            limit,
            HAND_PICKED,
            args.out / f"teacher-{seed}.jsonl",
        )
        errors[SEARCHED] = planted.error(found.model, planted.test)
        fresh = planted.student({p: c for p, c in found.best.candidate.items() if not c.is_empty}, seed)
        planted.fit(fresh, budget.steps, seed, bar.update)
        errors[ALONE] = planted.error(fresh, planted.test)
        bar.write(str(errors))
        if not runs:
            found.search.plot(args.out / "teacher.png")
        runs.append(
            {"seed": seed, "limit": limit, "known": forms_of(planted.known), "errors": errors, **found.summary()}
        )
    names = list(runs[0]["errors"])
    rows = [[str(run["seed"]), *(f"{run['errors'][name]:.4f}" for name in names)] for run in runs]
    means = [sum(run["errors"][name] for run in runs) / len(runs) for name in names]
    rows.append(["mean", *(f"{mean:.4f}" for mean in means)])
    limits = ", ".join(str(limit) for limit in sorted({run["limit"] for run in runs}))
    title = (
        f"Planted teachers: error on test scans after {budget.steps} steps, within the teacher's parameters "
        f"({limits}); 1 is the base itself. {SEARCHED}: as many steps from the supernet's values, the best of "
        f"{budget.top} by validation, {budget.searched_steps} steps in all. {ALONE}: the same configuration "
        "from fresh values"
    )
    return runs, f"{title}\n\n{table(['teacher', *names], rows)}"


class Digits:
    """The digits 5 to 9: a test set, and for each seed scans to train on and to choose by."""

    def __init__(self, pretrained: VisionTransformer, device: torch.device) -> None:
        self.pretrained = pretrained
        self.test, self.pool = split(load_pictures(range(5, 10), device), per_class=80, seed=0)

    def parts(self, seed: int) -> tuple[Pictures, Pictures]:
        """40 scans a class to train on, 40 to choose by."""
        return split(self.pool, per_class=40, seed=seed)

    def base(self, seed: int) -> VisionTransformer:
        """A copy of the pretrained model with a fresh head."""
        torch.manual_seed(seed)
        model = copy.deepcopy(self.pretrained)
        model.head.reset_parameters()
        return model

    def adapted(self, candidate: Candidate, seed: int) -> nn.Module:
        chosen = {path: config for path, config in candidate.items() if not config.is_empty}
        return gk.inject(self.base(seed), chosen, list(chosen), train=["head"])

    def supernet(self, seed: int) -> gk.Supernet:
        return gk.Supernet(self.base(seed), SPACE, LINEARS, train=["head"], seed=seed)


def loss(model: nn.Module, pictures: Pictures) -> float:
    return F.cross_entropy(predict(model, pictures[0]), pictures[1]).item()


def run_comparison(
    digits: Digits, sizes: Sizes, args: argparse.Namespace, bar: tqdm
) -> tuple[list[dict[str, Any]], str]:
    """Each method with each seed. Returns the results, and the tables."""
    budget = sizes.comparison
    runs: list[dict[str, Any]] = []
    hand_picked = {LORA: layers(EVERY, LINEARS, LORA_4), "GLoRA": layers(EVERY, LINEARS, GLORA_3)}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        training, validation = digits.parts(seed)

        def fit(model: nn.Module, steps: int, rate: float, seed: int = seed, data: Pictures = training) -> None:
            train(model, data, data, steps=steps, learning_rate=rate, seed=seed, on_step=bar.update)

        bar.set_description(f"digits, seed {seed}, {SEARCHED}")
        net = digits.supernet(seed)
        sampled = Sampled(net, switch_off=SWITCH_OFF, max_parameters=LIMIT)
        fit(sampled, budget.supernet_steps, SUPERNET_RATE)
        found = search_and_finish(
            net,
            partial(loss, pictures=validation),
            partial(fit, steps=budget.retraining_steps, rate=RATES[SEARCHED]),
            budget,
            seed,
            LIMIT,
            hand_picked,
            args.out / f"digits-{seed}.jsonl",
        )
        drawn = next(done.candidate for done in found.search.finished if done.name is None)
        models = {}
        for name, candidate in {**hand_picked, "random": drawn, ALONE: found.best.candidate}.items():
            bar.set_description(f"digits, seed {seed}, {name}")
            models[name] = digits.adapted(candidate, seed)
            fit(models[name], budget.steps, RATES[name])
        models[SEARCHED] = found.model
        if not runs:
            found.search.plot(args.out / "digits.png")
        scores = {
            name: {"validation": 100 * accuracy(model, validation), "test": 100 * accuracy(model, digits.test)}
            for name, model in models.items()
        }
        bar.write(str(scores))
        runs.append({"seed": seed, "limit": LIMIT, "accuracy": scores, **found.summary()})
    return runs, comparison_tables(runs, budget)


def comparison_tables(runs: list[dict[str, Any]], budget: Budget) -> str:
    names = list(runs[0]["accuracy"])
    test = {name: [run["accuracy"][name]["test"] for run in runs] for name in names}
    rows = [[str(run["seed"]), *(f"{run['accuracy'][name]['test']:.1f}" for name in names)] for run in runs]
    rows.append(["mean", *(spread(test[name]) for name in names)])
    paired = []
    for name in names[:-1]:
        d = differences(test[SEARCHED], test[name])
        paired.append(
            [name, plus_minus(d["mean"], d["standard_error"], len(runs), "+.2f"), f"{d['higher']} of {len(runs)}"]
        )
    random_scores = [run["random_mean"] for run in runs]
    best = [run["inherited_best"] for run in runs]
    return "\n\n".join([
        f"Digits 5-9: test accuracy, %, after {budget.steps} steps, at most {LIMIT:,} parameters beside the head. "
        f"{SEARCHED}: {budget.searched_steps} steps in all, with those of its supernet. {ALONE}: the same "
        "configuration, trained as the others are",
        table(["seed", *names], rows),
        table(["searched − ...", "points, mean ± standard error", "higher"], paired),
        f"Validation loss with inherited weights: {spread(random_scores, '.3f')} the mean random candidate within the "
        f"limit, {spread(best, '.3f')} the best one found.",
    ])  # fmt: skip


def run_sampling(digits: Digits, sizes: Sizes, args: argparse.Namespace, bar: tqdm) -> tuple[list[dict[str, Any]], str]:
    """Supernets trained in both ways with each seed. Returns the results, and the table."""
    runs: list[dict[str, Any]] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        training, _ = digits.parts(seed)
        found: dict[str, list[float]] = {}
        took: dict[str, float] = {}
        for per in PER:
            bar.set_description(f"sampling, seed {seed}, one configuration a {per}")
            sampled = Sampled(net := digits.supernet(seed), per=per)
            started = time.perf_counter()
            train(
                sampled, training, training, steps=sizes.sampling_steps, learning_rate=SUPERNET_RATE, seed=seed,
                on_step=bar.update,
            )  # fmt: skip
            took[per] = (time.perf_counter() - started) / sizes.sampling_steps
            with digits.supernet(seed).sample(sizes.subnets) as candidates:  # the same ones for both
                pass
            found[per] = []
            for candidate in candidates:
                with net.use(candidate) as model:
                    found[per].append(100 * accuracy(model, digits.test))
        runs.append({"seed": seed, "accuracy": found, "seconds_a_step": took})
        bar.write(str({per: sum(found[per]) / sizes.subnets for per in PER}))
    means = {per: [sum(run["accuracy"][per]) / sizes.subnets for run in runs] for per in PER}
    d = differences(means["row"], means["batch"])
    rows = [
        [str(run["seed"]), *(f"{means[per][i]:.1f}" for per in PER), f"{d['each'][i]:+.1f}"]
        for i, run in enumerate(runs)
    ]
    rows.append(
        ["mean", *(spread(means[per]) for per in PER), plus_minus(d["mean"], d["standard_error"], len(runs), "+.1f")]
    )
    title = (
        f"Supernets after {sizes.sampling_steps} steps of up to 50 scans: mean test accuracy, %, of {sizes.subnets} "
        "random configurations (± in the last column: standard error)"
    )
    times = {per: 1000 * sum(run["seconds_a_step"][per] for run in runs) / len(runs) for per in PER}
    cost = f"A step takes {times['row']:.0f} ms with one an example, {times['batch']:.0f} ms with one a batch."
    return (
        runs,
        f"{title}\n\n{table(['seed', 'a configuration an example', 'one a batch', 'difference'], rows)}\n\n{cost}",
    )


def count_steps(sizes: Sizes, args: argparse.Namespace) -> int:
    """The steps of everything that is run, for the bar."""
    each = {
        "teacher": sizes.teachers * ((len(HAND_PICKED) + 2) * sizes.student.steps + sizes.student.searched_steps),
        "comparison": args.seeds * len(RATES) * sizes.comparison.steps,
        "sampling": args.seeds * len(PER) * sizes.sampling_steps,
    }
    return sizes.pretraining_steps + sum(each[section] for section in args.sections)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Structure search on a small vision transformer: a planted teacher, the digits, how to sample.",
        epilog="Needs: pip install 'glora_kernels[examples]'",
    )
    add_arguments(parser, out="out/search_digits", seeds=5)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to run")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it; of the teachers, too")
    args = parse_arguments(parser)
    sizes, device = SIZES_BY_NAME[args.size], torch.device(args.device)
    source, source_test = split(load_pictures(range(0, 5), device), per_class=140, seed=0)
    torch.manual_seed(0)
    pretrained = VisionTransformer(WIDTH, DEPTH, HEADS, classes=5).to(device)
    sections: dict[str, Any] = {}
    tables: list[str] = []
    with gk.backend(args.backend), tqdm(total=count_steps(sizes, args), unit="step", desc="pretraining on 0-4") as bar:
        train(
            pretrained, source, source_test, steps=sizes.pretraining_steps, learning_rate=2e-3, seed=0,
            on_step=bar.update,
        )  # fmt: skip
        known = accuracy(pretrained, source_test)
        about = f"Structure search on digits; the transformer knows {100 * known:.1f} % of held-out digits 0-4."
        digits = Digits(pretrained, device)
        for name in args.sections:
            started = time.perf_counter()
            if name == "teacher":
                runs, text = run_teachers(pretrained, sizes, args, bar)
            elif name == "comparison":
                runs, text = run_comparison(digits, sizes, args, bar)
            else:
                runs, text = run_sampling(digits, sizes, args, bar)
            sections[name] = {"seconds": time.perf_counter() - started, "runs": runs}
            tables.append(f"{text}\n\n({sections[name]['seconds']:.0f} s)")
            write(args.out, about, args, sizes, sections, tables)  # after each: a run may be stopped
    show(args.out)


if __name__ == "__main__":
    main()
