"""What the digits examples work with: a small vision transformer, the digits, and one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"tiny": (32, 3, 4), "small": (64, 4, 4), "base": (128, 6, 8)}
"""Width, blocks and heads of each --model."""

LINEARS = ["q", "k", "v", "proj", "fc1", "fc2"]
"""The linear layers of a block, the ones to adapt."""

Pictures = tuple[Tensor, Tensor]
"""Scans (count, 8, 8) with values in [-1, 1], and their labels (count,), counted from zero, or other targets."""


class Block(nn.Module):
    """One pre-norm transformer block. Its linears are called one by one, so each can be replaced by name."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self.split_heads(layer(h)) for layer in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class VisionTransformer(nn.Module):
    """8x8 scans as 16 patches of 2x2 and a class token, whose final state goes through `head`."""

    def __init__(self, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, scans: Tensor) -> Tensor:
        patches = scans.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.class_token.expand(len(scans), -1, -1), self.patches(patches)], dim=1)
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 0]))


def load_pictures(classes: range, device: torch.device) -> Pictures:
    """The scans of some classes from scikit-learn's handwritten digits: about 180 a class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return scans[chosen].to(device), (labels[chosen] - classes.start).to(device)


def split(pictures: Pictures, per_class: int, seed: int) -> tuple[Pictures, Pictures]:
    """A random set with `per_class` scans of every class, and all the others."""
    scans, labels = pictures
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    taken = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        taken[order[labels[order] == label][:per_class]] = True
    return (scans[taken], labels[taken]), (scans[~taken], labels[~taken])


@torch.no_grad()
def predict(model: nn.Module, scans: Tensor) -> Tensor:
    """The logits of all scans."""
    was_training = model.training
    logits = torch.cat([model.eval()(part) for part in scans.split(256)])
    model.train(was_training)
    return logits


def accuracy(model: nn.Module, pictures: Pictures) -> float:
    scans, labels = pictures
    return (predict(model, scans).argmax(1) == labels).float().mean().item()


@dataclass
class Run:
    """One training: the curves at the evaluated steps, the seconds spent in steps, and the memory."""

    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    memory_bytes: int = 0


def train(
    model: nn.Module,
    pictures: Pictures,
    held_out: Pictures,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    evaluate_every: int | None = None,
    on_step: Callable[[], object] = lambda: None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    score: Callable[[nn.Module, Pictures], float] = accuracy,
) -> Run:
    """AdamW on the parameters that require gradients, with warm-up and cosine decay, for a number of steps.

    `held_out` is only looked at: nothing stops early and no state is chosen by it. A loss in the result is
    the mean over the steps since the evaluation before. The seconds leave the evaluations out. With another
    `loss_of` outputs and targets, `score` says what stands in the place of the accuracies.
    """
    scans, labels = pictures
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    on_gpu = scans.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(scans.device)

    run, order, recent = Run(), torch.empty(0, dtype=torch.long), []
    model.train()
    for step in range(1, steps + 1):
        started = time.perf_counter()
        if not len(order):
            order = torch.randperm(len(labels), generator=generator)
        batch, order = order[:50].to(labels.device), order[50:]
        loss = loss_of(model(scans[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(loss.item())  # waits for the device, so the clock below is honest
        run.seconds += time.perf_counter() - started
        if step == steps or (evaluate_every and step % evaluate_every == 0):
            run.steps.append(step)
            run.accuracies.append(score(model, held_out))
            run.losses.append(sum(recent) / len(recent))
            recent.clear()
        on_step()

    if on_gpu:
        run.memory_bytes = torch.cuda.max_memory_allocated(scans.device)
    else:
        run.memory_bytes = held_bytes(model, optimizer, scans[:50])
    return run


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up + 1))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, scans: Tensor) -> int:
    """What a step holds as backward begins: weights, gradients, optimizer state, saved activations.

    The peak that the operating system reports for a process says little about a model this small. This counts
    each storage once, those included that autograd keeps from a forward.
    """
    tensors: list[Tensor] = [*model.parameters()]
    tensors += [weight.grad for weight in tensors if weight.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(scans)  # while the result lives, so does its graph, and no address is used twice
    total = sum(held.values())
    del logits
    return total
