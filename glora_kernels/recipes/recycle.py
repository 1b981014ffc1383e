"""LoRA Recycle: one adapter that learns a new task from a few examples, made of many trained ones without their data.

Source: Hu et al., "Unlocking Tuning-Free Few-Shot Adaptability in Visual Foundation Models by Recycling Pre-Tuned
LoRAs", CVPR 2025.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glora_kernels.methods.using import using
from glora_kernels.nn.model import evaluating
from glora_kernels.runtime.progress import progress as shown

Path = str | os.PathLike[str]


class Synthetic(NamedTuple):
    """Images (n, ...) that a teacher takes for these labels (n,), and which teacher."""

    images: Tensor
    labels: Tensor
    teacher: Path


def invert(
    model: nn.Module,
    teacher: Path,
    classes: int,
    shape: Sequence[int],
    per_class: int = 8,
    steps: int = 200,
    lr: float = 0.25,
    regularizer: Callable[[Tensor], Tensor] | None = None,
    weight: float = 0.01,
    seed: int = 0,
) -> Synthetic:
    """Images that the adapted teacher classifies with confidence: Adam on cross-entropy + weight·regularizer.

    Args:
        model: images → logits, with the teacher's configuration; unchanged bit for bit afterwards.
        teacher: a file of `save_adapter`, with the teacher's head (`inject(train=["head"])`).
        classes: of the teacher.
        shape: of one image.
        per_class, steps, lr, weight, seed: how many images of each, and how they are made.
        regularizer: images → a penalty; the authors take the distance to the batch statistics of a pretrained network.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class).to(parameter.device)
    images = torch.randn(len(labels), *shape, generator=generator).to(parameter).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=lr)
    with using(model, teacher), evaluating(model):
        for _ in range(steps):
            loss = F.cross_entropy(model(images), labels)
            if regularizer is not None:
                loss = loss + weight * regularizer(images)
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
    return Synthetic(images.detach(), labels, teacher)


def prototype_logits(support: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """−‖f(query) − centre_c‖², the centres being the mean features of each class's support examples (n, K)."""
    one_hot = F.one_hot(labels, classes).to(support.dtype)
    centres = (one_hot.t() @ support) / one_hot.sum(0)[:, None]
    return -(queries[:, None] - centres[None]).square().sum(-1)


def recycle(
    model: nn.Module,
    features: Callable[[nn.Module, Tensor], Tensor],
    data: Sequence[Synthetic],
    steps: int = 200,
    ways: int = 3,
    shots: int = 1,
    lr: float = 1e-3,
    mixed: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Meta-train the model's adapter on tasks made of synthetic images. Returns the loss of each step.

    A task has `ways` classes of one teacher, with `shots` support examples each, the rest as queries: the student's
    prototype logits learn the teacher's (KL). With the probability `mixed` they are drawn from all teachers, for whose
    mixture no teacher exists: cross-entropy on the labels. All in eval mode: batch statistics stay.

    Args:
        model: with an adapter (the authors: rank 4 on q and v), whose head is not used.
        features: the model and images → features (n, K), before the head.
        data: of `invert`, for two teachers or more if `mixed` is above 0.
    """
    if not data or (mixed and len(data) < 2):
        raise ValueError(f"recycle needs images of one teacher, with mixed={mixed} of two or more; got {len(data)}")
    if least := [count for one in data if (count := int(one.labels.max()) + 1) < ways]:
        raise ValueError(f"ways={ways} is more than the {least[0]} classes of a teacher")
    if most := [int(n) for one in data for n in one.labels.bincount() if n <= shots]:
        raise ValueError(f"shots={shots} leaves no query of a class with {most[0]} images")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    with evaluating(model):
        for _ in shown(range(steps), "recycling", progress):
            is_mixed = float(torch.rand((), generator=generator)) < mixed
            *_, asked, teacher = task = _task(data, ways, shots, is_mixed, generator)
            if is_mixed:
                loss = F.cross_entropy(_logits(model, features, task, ways), asked)
            else:
                with torch.no_grad(), using(model, teacher):  # first: it writes to what the student's graph holds
                    target = _logits(model, features, task, ways).log_softmax(-1)
                student = _logits(model, features, task, ways).log_softmax(-1)
                loss = F.kl_div(student, target, reduction="batchmean", log_target=True)
            for p, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                p.grad = grad
            optimizer.step()
            losses.append(loss.item())
    optimizer.zero_grad()
    return losses


_Task = tuple[Tensor, Tensor, Tensor, Tensor, Path]
"""Support examples and their labels, queries and theirs, the teacher."""


def _task(data: Sequence[Synthetic], ways: int, shots: int, is_mixed: bool, generator: torch.Generator) -> _Task:
    teacher = int(torch.randint(len(data), (), generator=generator))
    teachers = range(len(data)) if is_mixed else [teacher]
    pairs = [(i, c) for i in teachers for c in range(int(data[i].labels.max()) + 1)]
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:ways]]
    parts: tuple[list[Any], list[Any]] = ([], [])
    for label, (i, c) in enumerate(chosen):
        images = data[i].images[data[i].labels == c]
        images = images[torch.randperm(len(images), generator=generator).to(images.device)]
        for part, own in zip(parts, (images[:shots], images[shots:]), strict=True):
            part.append((own, torch.full((len(own),), label, device=own.device)))
    (support, labels), (queries, asked) = ([torch.cat(own) for own in zip(*part, strict=True)] for part in parts)
    return support, labels, queries, asked, data[teacher].teacher


def _logits(model: nn.Module, features: Callable[[nn.Module, Tensor], Tensor], task: _Task, ways: int) -> Tensor:
    support, labels, queries, *_ = task
    both = features(model, torch.cat([support, queries]))
    return prototype_logits(both[: len(support)], labels, both[len(support) :], ways)
