"""What the text studies work with: a small LLaMA, its training loop, and its loss on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 1024
WINDOW = 128
"""Tokens of context, in training and in testing."""


def build_model(width: int, depth: int, intermediate: int | None = None) -> nn.Module:
    """A LLaMA of `depth` decoder layers with fresh weights; nothing is downloaded.

    Args:
        width: of the residual stream.
        depth: decoder layers.
        intermediate: width inside the MLP; None: 2¾ times `width`.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=intermediate or width * 11 // 4,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=WINDOW,
            use_cache=False,
        )
    )


def token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean of -log p(next token) over windows (count, WINDOW + 1), in nats."""
    logits = model(input_ids=windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor) -> float:
    """The loss over all of a text, cut into windows one after the other; what does not fill one is left out."""
    was_training = model.training
    model.eval()
    windows = tokens[:-1].unfold(0, WINDOW + 1, WINDOW)
    losses = [token_loss(model, part) * len(part) for part in windows.split(32)]
    model.train(was_training)
    return torch.stack(losses).sum().item() / len(windows)


@dataclass
class Run:
    """One training: the curves at the evaluated steps, the seconds spent in steps, and the optimizer's bytes."""

    steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    seconds: float = 0.0
    optimizer_bytes: int = 0


def train(
    model: nn.Module,
    tokens: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    evaluate_every: int | None = None,
    on_step: Callable[[], object] = lambda: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Run:
    """AdamW on the parameters that require gradients, with warm-up and cosine decay, for a number of steps.

    Or another optimizer, which has its learning rates already.

    The `batch` windows of a step begin anywhere in `tokens`; which ones they are depends on `seed` alone. `held_out` is
    only looked at: nothing stops early and no state is chosen by it. A training loss in the result is the mean
    over the steps since the evaluation before. The seconds leave the evaluations out.
    """
    if optimizer is None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(WINDOW + 1)

    run, recent = Run(), []
    model.train()
    for step in range(1, steps + 1):
        started = time.perf_counter()
        begins = torch.randint(len(tokens) - WINDOW, (batch, 1), generator=generator)
        loss = token_loss(model, tokens[(begins + window).to(tokens.device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(loss.item())  # waits for the device, so the clock below is honest
        run.seconds += time.perf_counter() - started
        if step == steps or (evaluate_every and step % evaluate_every == 0):
            run.steps.append(step)
            run.held_out.append(held_out_loss(model, held_out))
            run.training.append(sum(recent) / len(recent))
            recent.clear()
        on_step()
    run.optimizer_bytes = state_bytes(optimizer)
    return run


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up + 1))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of every tensor in the optimizer's state: AdamW's two moments and step count a parameter."""
    states = optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
