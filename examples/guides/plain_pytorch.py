"""GLoRA in a plain PyTorch loop, without PEFT: gk.inject, train, save, load, merge.

    python examples/guides/plain_pytorch.py
    python examples/guides/plain_pytorch.py --steps 200

A small classifier learns scikit-learn's scanned digits 0 to 4 and is frozen. Then its hidden layers get GLoRA adapters
and its head is trained as well, for the digits 5 to 9.
"""

from __future__ import annotations

import sys

from guide_parts import draw_losses, largest_difference, missing, parse_arguments, print_table

if message := missing("sklearn=scikit-learn"):
    sys.exit(message)

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import trange

import glora_kernels as gk


def build_model() -> nn.Module:
    """Your own model goes here: any module with nn.Linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 5))


def load_scans(classes: range, device: str) -> tuple[Tensor, Tensor]:
    """Scans (count, 64) of five classes, and their labels from 0 to 4."""
    digits = load_digits()
    scans, labels = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return scans[chosen].to(device), (labels[chosen] - classes.start).to(device)


def train(model: nn.Module, scans: Tensor, labels: Tensor, steps: int, name: str) -> list[float]:
    """The loss of every step; an ordinary loop."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in trange(steps, desc=name):
        batch = torch.randint(len(labels), (64,), generator=generator).to(labels.device)
        loss = F.cross_entropy(model(scans[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, scans: Tensor, labels: Tensor) -> float:
    return (model.eval()(scans).argmax(1) == labels).float().mean().item()


def main() -> None:
    args = parse_arguments(__doc__, steps=150, smoke=30)
    path = args.out / "plain_pytorch.safetensors"
    model = build_model().to(args.device)
    train(model, *load_scans(range(5), args.device), args.steps, "the base")
    base_state = {name: value.clone() for name, value in model.state_dict().items()}
    (scans, labels), (test_scans, test_labels) = split(*load_scans(range(5, 10), args.device))
    before = accuracy(model, test_scans, test_labels)

    config = gk.GLoRAConfig(A="vector", B="lora", C="vector", D="vector", E="vector", rank=4, alpha=8)
    model = gk.inject(model, config, target_modules=["0", "2"], train=["4"])
    print(f"{gk.trainable_parameters(model):,} parameters are trained")
    losses = train(model, scans, labels, args.steps, "GLoRA")

    gk.save_adapter(model, path)

    model.eval()
    logits = model(scans)
    with gk.disabled(model):
        base_logits = model(scans)
    gk.merge(model)
    merged_logits = model(scans)
    gk.unmerge(model)
    unmerged_logits = model(scans)

    fresh = build_model().to(args.device)
    fresh.load_state_dict(base_state)
    fresh = gk.load_adapter(fresh, path)
    loaded_logits = fresh.eval()(scans)

    model = gk.merge_and_unload(model)
    print_table(
        [
            ("check", "largest difference of the logits"),
            ("saved and loaded into the base model", f"{largest_difference(logits, loaded_logits):.1e}"),
            ("merged", f"{largest_difference(logits, merged_logits):.1e}"),
            ("merged and unmerged", f"{largest_difference(logits, unmerged_logits):.1e}"),
            ("what the adapters add", f"{largest_difference(logits, base_logits):.1e}"),
        ]
    )
    print(f"accuracy on unseen scans: {before:.0%} before, {accuracy(model, test_scans, test_labels):.0%} after")
    draw_losses({"GLoRA": losses}, "GLoRA on the digits 5 to 9", args.out / "plain_pytorch.png")


def split(scans: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Every fourth scan for testing, the others to train on."""
    test = torch.arange(len(labels), device=labels.device) % 4 == 0
    return (scans[~test], labels[~test]), (scans[test], labels[test])


if __name__ == "__main__":
    main()
