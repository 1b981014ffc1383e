"""A vision transformer from timm with GLoRA or ShareLoRA adapters, trained by Lightning.

    python examples/guides/timm_lightning.py
    python examples/guides/timm_lightning.py --steps 200

The transformer is made from its configuration (your `pretrained=True` goes there), and learns scikit-learn's digits.
Lightning saves a checkpoint of the run, gk.save_adapter a file with the adapters and the head alone.
"""

from __future__ import annotations

import argparse
import sys

from guide_parts import draw_losses, largest_difference, missing, parse_arguments, print_table

if message := missing("timm", "torchvision", "lightning", "sklearn=scikit-learn"):
    sys.exit(message)

import lightning
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import glora_kernels as gk


def build_model() -> nn.Module:
    """A ViT of three blocks for pictures of 8 x 8, always with the same fresh weights."""
    torch.manual_seed(0)
    settings = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "global_pool": "avg",
    }
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **settings)


def add_adapters(model: nn.Module) -> nn.Module:
    """GLoRA on the first block, ShareLoRA on the others, and the new head trained whole."""
    glora = gk.GLoRAConfig(A="vector", B="lora", C="vector", D="vector", E="vector", rank=4, alpha=8)
    lora = gk.ShareLoRAConfig(rank=4, alpha=8, share="A")
    torch.manual_seed(1)
    model = gk.inject(model, {"blocks.0.*": glora, "blocks.*": lora}, train=["head", "patch_embed"])
    return model


class Classifier(lightning.LightningModule):
    """An ordinary LightningModule; nothing in it knows about glora_kernels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = batch
        loss = F.cross_entropy(self.model(pictures), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=3e-3)


def load_parts() -> tuple[TensorDataset, TensorDataset]:
    """Pictures (1, 8, 8) and labels, to train on and to test on."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    return TensorDataset(pictures[:1500], labels[:1500]), TensorDataset(pictures[1500:], labels[1500:])


def fit(classifier: Classifier, training: TensorDataset, args: argparse.Namespace) -> None:
    loader = DataLoader(training, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=args.out,
    )
    trainer.fit(classifier, loader)
    trainer.save_checkpoint(args.out / "timm_lightning.ckpt")


@torch.no_grad()
def logits_of(model: nn.Module, pictures: Tensor) -> Tensor:
    return model.eval().cpu()(pictures)


def main() -> None:
    args = parse_arguments(__doc__, steps=200, smoke=10)
    path = args.out / "timm_lightning.safetensors"
    training, held_out = load_parts()
    pictures, labels = held_out.tensors

    model = add_adapters(build_model())
    print(f"{gk.trainable_parameters(model):,} parameters are trained, of these shared:\n{gk.shared(model)}")
    classifier = Classifier(model)
    fit(classifier, training, args)

    gk.save_adapter(model, path)
    trained = logits_of(model, pictures)

    resumed = Classifier(add_adapters(build_model()))
    checkpoint = torch.load(args.out / "timm_lightning.ckpt", weights_only=True)
    resumed.load_state_dict(checkpoint["state_dict"])
    from_checkpoint = logits_of(resumed.model, pictures)

    loaded = gk.load_adapter(build_model(), path)
    from_adapter = logits_of(loaded, pictures)

    gk.merge(model)
    merged = logits_of(model, pictures)

    print_table(
        [
            ("check", "largest difference of the logits"),
            ("Lightning's checkpoint, loaded", f"{largest_difference(trained, from_checkpoint):.1e}"),
            ("the adapter's file, loaded into the base model", f"{largest_difference(trained, from_adapter):.1e}"),
            ("merged", f"{largest_difference(trained, merged):.1e}"),
        ]
    )
    sizes = [(args.out / name).stat().st_size for name in ("timm_lightning.ckpt", path.name)]
    print(f"{sizes[0]:,} bytes of checkpoint, {sizes[1]:,} bytes of adapter")
    print(f"accuracy on unseen digits: {(trained.argmax(1) == labels).float().mean():.0%}")
    draw_losses({"GLoRA and ShareLoRA": classifier.losses}, "timm's ViT, Lightning", args.out / "timm_lightning.png")


if __name__ == "__main__":
    main()
