"""What PEFT's DoRA, LoRA over experts and small layers cost, plain and accelerated, over the frozen base alone.

    python -m benchmarks.peft_ratios
    python -m benchmarks.peft_ratios --threads 2 --rounds 21 --out benchmarks/results/peft_ratios/cpu.md

A step is forward and backward, with dx and every gradient of the adapter. The three take turns in every round; a ratio
is the median of the rounds' own. The accelerated output is compared with PEFT's before anything is timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import glora_kernels as gk
from benchmarks import devices, results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
"""The relative difference from PEFT's output: sums of about a thousand products, in another order."""

MORE = 20
"""As many times the rounds for a small layer, whose step is short."""


class Problem(NamedTuple):
    """A name, the frozen module, and a function that gives it PEFT's adapters; the arguments of a call."""

    name: str
    frozen: nn.Module
    adapted: Callable[[nn.Module], nn.Module]
    arguments: tuple[Tensor, ...]
    make: Callable[[], nn.Module]


class Holder(nn.Module):
    """A module with one layer, as PEFT wants it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args)


def dora(rows: int, dtype: torch.dtype, features: int = 2048, rank: int = 16) -> Problem:
    """One linear layer with DoRA."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], use_dora=True)
    return linear(f"DoRA, {rows} x {features}², rank {rank}", config, rows, features, dtype)


def small(what: str, rows: int, features: int) -> Problem:
    """A linear layer whose cost is that of its calls, in fp32."""
    from peft import GloraConfig, LoraConfig

    configs: dict[str, Any] = {
        "LoRA": LoraConfig(r=8, target_modules=["layer"]),
        "LoRA, dropout": LoraConfig(r=8, target_modules=["layer"], lora_dropout=0.1),
        "GLoRA, A = B = vector": GloraConfig(
            r=8, target_modules=["layer"], config_A_B="vector", config_C="none", config_D_E="none"
        ),
    }
    return linear(f"{what}, {rows} x {features}²", configs[what], rows, features, torch.float32)


def linear(name: str, config: Any, rows: int, features: int, dtype: torch.dtype) -> Problem:
    """One linear layer."""
    from peft import get_peft_model

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Holder(nn.Linear(features, features, bias=False)).to(dtype).requires_grad_(False)

    def adapted(model: nn.Module) -> nn.Module:
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    x = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    return Problem(name, make(), adapted, (x,), make)


def experts(
    rows: int, dtype: torch.dtype, count: int = 32, top: int = 4, hidden: int = 1024, inner: int = 512
) -> Problem:
    """An experts module of Qwen3-MoE: `rows` rows an expert on average."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    tokens = rows * count // top
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=top)
    config._experts_implementation = "grouped_mm"

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Holder(Qwen3MoeExperts(config)).to(dtype).requires_grad_(False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=hidden**-0.5)
        return model

    def adapted(model: nn.Module) -> nn.Module:
        names = ["layer.gate_up_proj", "layer.down_proj"]
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=names)
        return get_peft_model(model, lora, autocast_adapter_dtype=False)

    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    index = torch.stack([torch.randperm(count)[:top] for _ in range(tokens)])
    weights = torch.rand(tokens, top).to(dtype)
    name = f"experts, {rows} rows an expert, {count} of {hidden} x {inner}, top {top}, rank 4"
    return Problem(name, make(), adapted, (x, index, weights), make)


def filled(model: nn.Module) -> nn.Module:
    """With adapters that change something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "glora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def measure(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each contestant, round by round."""
    peft = filled(problem.adapted(problem.make()))
    ours = gk.accelerate(filled(problem.adapted(problem.make())), verbose=False)
    with torch.no_grad():  # without dropout, whose masks differ
        expected, found = (model.eval()(*problem.arguments).double() for model in (peft, ours))
        error = float((found - expected).norm() / expected.norm())
        bound = ALLOWED[problem.arguments[0].dtype]
        if not error <= bound:
            raise AssertionError(
                f"{problem.name}: the accelerated output differs by {error:.1e}, more than {bound:.1e}"
            )

    def step(model: nn.Module) -> float:
        started = time.perf_counter()
        model(*problem.arguments).float().sum().backward()
        taken = time.perf_counter() - started
        problem.arguments[0].grad = None
        return taken

    models = {"frozen": problem.frozen, "PEFT": peft.train(), "accelerated": ours.train()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for place in range(rounds + 2):
        for name, model in models.items():
            seconds = step(model)
            if place >= 2:
                taken[name].append(seconds)
    if reasons := gk.acceleration(ours).fallbacks:
        raise AssertionError(f"{problem.name}: PEFT's path ran: {reasons}")
    return taken


def problems(rounds: int) -> Iterator[tuple[Problem, int]]:
    """Every problem, with its number of rounds: a small one takes more of them."""
    for kind, sizes in ((dora, (256, 1024)), (experts, (8, 64))):
        for rows in sizes:
            for dtype in DTYPES.values():
                yield kind(rows, dtype), rounds
    for what in ("LoRA", "LoRA, dropout", "GLoRA, A = B = vector"):
        for rows, features in ((1, 256), (64, 256), (256, 512)):
            yield small(what, rows, features), MORE * rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant (default 11)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"Forward and backward over the frozen base: median [p20, p80] of {args.rounds} rounds, "
        f"{MORE * args.rounds} of small layers. {devices.get('cpu').name()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, peft {version('peft')}; "
        f"`python -m benchmarks.peft_ratios --threads {args.threads} --rounds {args.rounds}`.",
        "",
        "| what | dtype | frozen, ms | PEFT | accelerated |",
        "|------|-------|------------|------|-------------|",
    ]
    for problem, rounds in problems(args.rounds):
        taken = measure(problem, rounds)
        dtype = next(name for name, dtype in DTYPES.items() if dtype == problem.arguments[0].dtype)
        cells = [problem.name, dtype, f"{1e3 * statistics.median(taken['frozen']):.3g}"]
        for contestant in ("PEFT", "accelerated"):
            ratios = [a / b for a, b in zip(taken[contestant], taken["frozen"], strict=True)]
            low, _, _, high = statistics.quantiles(ratios, n=5)
            cells.append(f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    results.put_out("\n".join(lines) + "\n", args.out)


if __name__ == "__main__":
    main()
