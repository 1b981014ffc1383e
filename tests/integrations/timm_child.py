"""Lightning trains a vision transformer of timm on scikit-learn's digits; `test_lightning.py` starts this process.

timm, and torchvision that it needs, are on the path of this process alone. In float64 (Lightning's "64-true") every
loss is plain PEFT's to rounding, and PEFT's own forward raises while an accelerated model trains.

    python timm_child.py FOLDER
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import peft
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from only_ours import only_ours
from sklearn.datasets import load_digits
from timm.layers import set_reentrant_ckpt
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import glora_kernels as gk
from glora_kernels.nn.model import named_layers

EXACT = 1e-12
BATCH, STEPS, EPOCHS = 16, 6, 2
TARGETS = r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
"""The linears of the blocks. The name "proj" alone is also that of timm's patch embedding, a convolution."""

LORA = partial(peft.LoraConfig, r=3, lora_alpha=6, target_modules=TARGETS, modules_to_save=["head"])
GLORA = partial(
    peft.GloraConfig,
    r=3,
    config_A_B="lora",
    config_C="lora",
    config_D_E="vector",
    target_modules=TARGETS,
    modules_to_save=["head"],
)


class Classifier(LightningModule):
    """What a user writes: the model, a loss, an optimizer. It keeps the losses."""

    def __init__(self, model):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)  # Adam's quotients amplify rounding
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def vit(dtype):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=3
    )
    return model.to(dtype)


def away_from_zero(model):
    """The trained parameters, alike for every model with the same adapter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def plain(config, dtype=torch.float64):
    return away_from_zero(peft.get_peft_model(vit(dtype), config()))


def injected(source):
    """Our own layers in place of PEFT's, with the configuration and the values of a PEFT model."""
    targets = ["blocks.*.qkv", "blocks.*.attn.proj", "fc1", "fc2"]
    is_lora = isinstance(source.active_peft_config, peft.LoraConfig)
    if is_lora:
        config = gk.GLoRAConfig.lora(rank=3, alpha=6)
    else:
        config = gk.GLoRAConfig(A="lora", B="lora", C="lora", D="vector", E="vector", rank=3)
    model = gk.inject(vit(torch.float64), config, target_modules=targets, train=["head"])
    inner = source.get_base_model()
    with torch.no_grad():
        for path, layer in named_layers(model).items():
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(value_of(inner.get_submodule(path), name, is_lora))
        model.head.load_state_dict(inner.head.modules_to_save["default"].state_dict())
    return model


def value_of(layer, name, is_lora):
    """The parameter of PEFT's layer that ours calls `name`."""
    letter, _, part = name.partition("_")
    if is_lora:
        return {"up": layer.lora_B, "down": layer.lora_A}[part]["default"].weight
    path = getattr(layer, f"glora_{letter}")["default"]
    return getattr(path, {"up": "Xd", "down": "Xu", "": "X"}[part])


def pictures(dtype):
    digits = load_digits()
    count = BATCH * STEPS
    scans = torch.tensor(digits.images[:count], dtype=dtype).unsqueeze(1) / 8 - 1
    return DataLoader(TensorDataset(scans, torch.tensor(digits.target[:count])), BATCH)


def fit(model, folder, precision="64-true", epochs=EPOCHS, resume=None, accumulation=1, keep=False):
    """Losses step by step. `resume`: a checkpoint to go on from; `keep`: write one after each epoch."""
    module = Classifier(model)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=0.5,
        logger=False,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)] if keep else [],
        enable_checkpointing=keep,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = pictures(torch.float64 if precision == "64-true" else torch.float32)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False if resume else None)
    return module.losses


def assert_alike(ours, theirs, tolerance=EXACT):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def accelerated_equals_plain(folder, config, accumulation=1):
    theirs, ours = plain(config), gk.accelerate(plain(config))
    expected = fit(theirs, folder, accumulation=accumulation)
    with only_ours():
        losses = fit(ours, folder, accumulation=accumulation)
    assert len(losses) == EPOCHS * STEPS
    torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)
    assert_alike(peft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))


def injected_equals_plain(folder, config):
    theirs = plain(config)
    ours = injected(theirs)
    expected = fit(theirs, folder, accumulation=2)
    losses = fit(ours, folder, accumulation=2)
    torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)


def resumes(folder, config):
    """A run of two epochs, and one that ends after the first and goes on from its checkpoint in a new model."""
    expected = fit(plain(config), folder)
    straight = gk.accelerate(plain(config), verbose=False)
    with only_ours():
        losses = fit(straight, folder, keep=True)
    torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)
    resumed = peft.get_peft_model(vit(torch.float64), config())
    gk.accelerate(resumed, verbose=False)
    with only_ours():
        rest = fit(resumed, folder, resume=folder / "epoch=0.ckpt")
    assert rest == losses[STEPS:]
    assert_alike(dict(resumed.named_parameters()), dict(straight.named_parameters()), 0.0)
    # The checkpoint of an accelerated model is one of a plain model.
    rest = fit(peft.get_peft_model(vit(torch.float64), config()), folder, resume=folder / "epoch=0.ckpt")
    torch.testing.assert_close(rest, expected[STEPS:], rtol=EXACT, atol=0)


def checkpoints_activations(folder, config, reentrant):
    def checkpointed():
        model = plain(config)
        inner = model.get_base_model()
        inner.set_grad_checkpointing()
        if reentrant:  # whose first segment has no gradient unless its input asks for one
            inner.patch_embed.register_forward_hook(lambda module, args, tokens: tokens.requires_grad_())
        return model

    expected = fit(plain(config), folder, epochs=1)
    set_reentrant_ckpt(reentrant)
    try:
        ours = gk.accelerate(checkpointed(), verbose=False)
        with only_ours():
            losses = fit(ours, folder, epochs=1)
    finally:
        set_reentrant_ckpt(False)
    torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)


def in_bf16(folder, config):
    """Against float64: what is trained, as one vector, is off by no more than twice what plain PEFT's is."""
    truth, theirs = plain(config), plain(config, torch.float32)
    ours = gk.accelerate(plain(config, torch.float32), verbose=False)
    fit(truth, folder)
    expected = fit(theirs, folder, "bf16-mixed")
    with only_ours():
        losses = fit(ours, folder, "bf16-mixed")
    assert losses != expected, "rounded alike at every place: not in bf16, or not ours"
    exact, peft_s, found = (as_vector(model) for model in (truth, theirs, ours))
    assert torch.dist(found, exact) <= 2 * torch.dist(peft_s, exact)


def as_vector(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


CASES = {
    "LoRA": partial(accelerated_equals_plain, config=LORA, accumulation=2),
    "GLoRA": partial(accelerated_equals_plain, config=GLORA),
    "inject, LoRA": partial(injected_equals_plain, config=LORA),
    "inject, GLoRA": partial(injected_equals_plain, config=GLORA),
    "LoRA, resumed": partial(resumes, config=LORA),
    "GLoRA, resumed": partial(resumes, config=GLORA),
    "LoRA, checkpointed": partial(checkpoints_activations, config=LORA, reentrant=False),
    "GLoRA, reentrant": partial(checkpoints_activations, config=GLORA, reentrant=True),
    "LoRA, bf16": partial(in_bf16, config=LORA),
    "GLoRA, bf16": partial(in_bf16, config=GLORA),
}


def main(folder):
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for number, (name, case) in enumerate(CASES.items()):
        start = time.perf_counter()
        print(f"{name}: ", end="", flush=True)
        case(folder / str(number))
        print(f"passed in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    with contextlib.redirect_stderr(sys.stdout):
        main(Path(sys.argv[1]))
