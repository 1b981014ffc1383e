"""PEFT's LoRA under transformers' Trainer, first as it is, then with one more line: gk.accelerate(model).

    python examples/guides/peft_lora.py
    python examples/guides/peft_lora.py --steps 60 --device cpu

Both runs start from the same weights and see the same batches. The script prints how far their losses are apart,
saves the adapter with PEFT, loads it with PEFT alone, and merges it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from guide_parts import (
    build_decoder,
    draw_losses,
    largest_difference,
    load_windows,
    logits_of,
    missing,
    parse_arguments,
    print_table,
)

if message := missing("transformers", "peft", "accelerate"):
    sys.exit(message)

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import glora_kernels as gk


def make_model() -> PeftModel:
    """A decoder with LoRA on every linear layer but the head, as PEFT makes it."""
    model = build_decoder()
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return model


def train(model: PeftModel, windows: list[dict[str, Any]], args: argparse.Namespace) -> list[float]:
    """The loss of every step; nothing in here knows about glora_kernels."""
    arguments = TrainingArguments(
        output_dir=str(args.out / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=windows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    args = parse_arguments(__doc__, steps=40, smoke=4)
    windows, held_out = (samples := load_windows())[:-8], samples[-8:]
    folder = str(args.out / "peft-lora")

    plain = make_model()
    plain_losses = train(plain, windows, args)

    model = make_model()
    gk.accelerate(model)
    losses = train(model, windows, args)

    model.save_pretrained(folder)
    trained = logits_of(model, held_out)

    loaded = PeftModel.from_pretrained(build_decoder(), folder)
    plain_logits = logits_of(loaded, held_out)

    gk.decelerate(model)
    switched_back = logits_of(model.cpu(), held_out)

    gk.accelerate(model, verbose=False)
    merged = model.merge_and_unload()
    merged_logits = logits_of(merged, held_out)

    print_table(
        [
            ("check", "largest difference"),
            ("loss by step: accelerated, plain PEFT", f"{largest_difference(losses, plain_losses):.1e}"),
            ("logits: accelerated, loaded by plain PEFT", f"{largest_difference(trained, plain_logits):.1e}"),
            ("logits: decelerated, loaded by plain PEFT", f"{largest_difference(switched_back, plain_logits):.1e}"),
            ("logits: accelerated, merged", f"{largest_difference(trained, merged_logits):.1e}"),
            ("largest logit", f"{trained.abs().max():.1e}"),
        ]
    )
    draw_losses({"plain PEFT": plain_losses, "accelerated": losses}, "PEFT's LoRA", args.out / "peft_lora.png")


if __name__ == "__main__":
    main()
