"""Diffusion models of diffusers: GLoRA as LyCORIS has it, and LoRA, trained, saved for ComfyUI and loaded again.

    python examples/guides/diffusion.py
    python examples/guides/diffusion.py --methods flux --steps 1000

A small UNet and a small Flux learn to draw scikit-learn's scanned digits 0 to 4 out of noise, by flow matching, and
are frozen. Then adapters on their linear layers learn 5 to 9. The picture shows what each draws before and after.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from guide_parts import largest_difference, missing, parse_arguments, plt, print_table

if message := missing("diffusers", "sklearn=scikit-learn"):
    sys.exit(message)

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import trange

import glora_kernels as gk

PROMPT = 32
"""The width of a prompt: a random vector for each digit stands in for the text encoder."""

METHODS = {
    "GLoRA": gk.GLoRAConfig(A="lora", B="lora", rank=8, alpha=8, alpha_A=8, variant="matmul"),
    "LoRA": gk.GLoRAConfig.lora(rank=8, alpha=8),
}
"""LyCORIS's GLoRA is the product variant, with one alpha for both products."""

ASKED = [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
"""The digits that are drawn for the picture."""

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"]
TARGETS = {
    "unet": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "time_emb_proj", *CONVOLUTIONS],
    "flux": [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "net.0.proj", "net.2", "proj_mlp", "proj_out"],
}
"""The layers that get adapters, by the ends of their names."""


class UNet(nn.Module):
    """Noisy images (B, 1, 8, 8), times (B,) from 0 to 1 and prompts (B, PROMPT) → velocities (B, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(24, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=PROMPT,
            attention_head_dim=16,
            norm_num_groups=8,
        )

    def forward(self, images: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        velocities: Tensor = self.net(images, 1000 * times, prompts[:, None]).sample
        return velocities


class Flux(nn.Module):
    """The same, on the 16 patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.net = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=PROMPT,
            pooled_projection_dim=PROMPT,
            axes_dims_rope=(4, 6, 6),
        )
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        places = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)
        self.register_buffer("places", places, persistent=False)

    def forward(self, images: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        patches = nn.functional.pixel_unshuffle(images, 2).flatten(2).mT
        places: Any = self.places
        velocities = self.net(
            hidden_states=patches,
            encoder_hidden_states=prompts[:, None],
            pooled_projections=prompts,
            timestep=times,
            img_ids=places,
            txt_ids=places[:1],
        ).sample
        return nn.functional.pixel_shuffle(velocities.mT.unflatten(2, (4, 4)), 2)


MODELS: dict[str, Any] = {"unet": UNet, "flux": Flux}


def load_images(digits: range, device: str) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 8, 8) of some digits, from -1 to 1, and which digits they are."""
    scans = load_digits()
    images, labels = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(scans.target)
    chosen = (labels >= digits.start) & (labels < digits.stop)
    return images[chosen].to(device), labels[chosen].to(device)


def prompts_of(labels: Tensor) -> Tensor:
    return torch.randn(10, PROMPT, generator=torch.Generator().manual_seed(0)).to(labels.device)[labels]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The squared error of the velocity from noise to image, halfway at a random time."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    times = torch.rand(len(images), generator=generator).to(images.device)
    by = times[:, None, None, None]
    return (model((1 - by) * noise + by * images, times, prompts_of(labels)) - (images - noise)).square().mean()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, name: str) -> None:
    """An ordinary loop."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in (bar := trange(steps, desc=name)):
        batch = torch.randint(len(labels), (32,), generator=generator).to(labels.device)
        loss = loss_of(model, images[batch], labels[batch], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def test_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The loss on unseen images, with the same noise for every model."""
    return loss_of(model.eval(), images, labels, torch.Generator().manual_seed(1)).item()


@torch.no_grad()
def drawn(model: nn.Module, labels: Tensor, steps: int = 20) -> Tensor:
    """Images of these digits out of noise, by Euler steps."""
    images = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(2)).to(labels.device)
    for step in range(steps):
        times = torch.full((len(labels),), step / steps, device=labels.device)
        images = images + model.eval()(images, times, prompts_of(labels)) / steps
    return images


def draw(rows: dict[str, dict[str, Tensor]], steps: int, path: Path) -> None:
    """A block for each model, in it a row for each state, with the images that it draws."""
    count = sum(map(len, rows.values()))
    figure = plt.figure(figsize=(8, 0.85 * count + 1.4), layout="constrained")
    figure.suptitle(f"What is drawn: by the frozen base, which has seen 0 to 4, and after {steps} steps of adapters")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (name, states) in zip(parts, rows.items(), strict=True):
        part.suptitle(name, fontsize=10)
        panels = part.subplots(len(states), 10)
        for panel, digit in zip(panels[0], ASKED, strict=True):
            panel.set_title(str(digit), fontsize=9)
        for row, (state, images) in zip(panels, states.items(), strict=True):
            row[0].set_ylabel(state, rotation=0, ha="right", va="center")
            for panel, image in zip(row, images.cpu(), strict=True):
                panel.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1)
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    args = parse_arguments(__doc__, steps=200, smoke=10, methods=list(MODELS))
    images, labels = load_images(range(5, 10), args.device)
    unseen = torch.arange(len(labels), device=labels.device) % 4 == 0
    seen, test = (images[~unseen], labels[~unseen]), (images[unseen], labels[unseen])
    asked = torch.tensor(ASKED, device=args.device)
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(3)).to(args.device)
    given = noise, torch.linspace(0, 1, 10, device=args.device), prompts_of(asked)

    table = [("model, method", "trained", "loss before", "after", "loaded differs by", "merged")]
    rows: dict[str, dict[str, Tensor]] = {}
    for name in args.methods:
        torch.manual_seed(0)
        base = MODELS[name]().to(args.device)
        train(base, *load_images(range(5), args.device), args.steps, name)
        states = rows[type(base.net).__name__] = {"frozen": drawn(base, asked)}
        for method, config in METHODS.items():
            model = copy.deepcopy(base)
            gk.inject(model.net, config, TARGETS[name])
            train(model, *seen, args.steps, f"{name}, {method}")
            states[method] = drawn(model, asked)
            path = args.out / f"diffusion-{name}-{method}.safetensors"
            gk.save_adapter(model.net, path, format="lycoris")

            loaded = copy.deepcopy(base).eval()
            gk.load_adapter(loaded.net, path)
            after = test_loss(model, *test)
            with torch.no_grad():
                velocities = model(*given)
                differs = largest_difference(velocities, loaded(*given))
                gk.merge_and_unload(loaded.net)
                merged = largest_difference(velocities, loaded(*given))
            losses = f"{test_loss(base, *test):.3f}", f"{after:.3f}"
            trained = str(gk.trainable_parameters(model.net))
            table.append((f"{name}, {method}", trained, *losses, f"{differs:.1e}", f"{merged:.1e}"))
    print_table(table)
    draw(rows, args.steps, args.out / "diffusion.png")


if __name__ == "__main__":
    main()
