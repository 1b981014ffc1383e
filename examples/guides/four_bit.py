"""QLoRA in two ways: PEFT on bitsandbytes' Linear4bit under TRL's SFTTrainer, accelerated; and without either.

    python examples/guides/four_bit.py
    python examples/guides/four_bit.py --steps 60 --device cpu

The first part is a QLoRA script as it is usually written, with gk.accelerate(model) added. The second quantizes the
same model with gk.quantize, puts GLoRA on it, which PEFT does not have over 4 bits, and trains it in a plain loop.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from guide_parts import (
    WINDOW,
    build_decoder,
    draw_losses,
    largest_difference,
    load_texts,
    load_windows,
    logits_of,
    missing,
    parse_arguments,
    print_table,
    train,
    train_tokenizer,
)

if message := missing("transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets"):
    sys.exit(message)

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import glora_kernels as gk


def load_base(checkpoint: Path, device: str, compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """A checkpoint in NF4, as transformers and bitsandbytes load it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, device_map=device)
    return model


def add_lora(model: Any) -> Any:
    """PEFT's LoRA on every linear layer but the head."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return model


def train_with_trl(model: PeftModel, args: argparse.Namespace) -> list[float]:
    """The loss of every step under SFTTrainer; nothing in here knows about glora_kernels."""
    dataset = Dataset.from_dict({"text": load_texts()})
    arguments = SFTConfig(
        output_dir=str(args.out / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        max_length=WINDOW,
        seed=0,
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=train_tokenizer())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    args = parse_arguments(__doc__, steps=40, smoke=4)
    windows, held_out = (samples := load_windows())[:-8], samples[-8:]
    checkpoint, adapter = args.out / "four-bit-base", args.out / "four-bit-lora"
    build_decoder().save_pretrained(checkpoint)  # stands in for a model of the hub

    plain_losses = train_with_trl(add_lora(load_base(checkpoint, args.device)), args)

    model = add_lora(load_base(checkpoint, args.device))
    gk.accelerate(model)
    losses = train_with_trl(model, args)

    model.save_pretrained(adapter)
    exact = PeftModel.from_pretrained(load_base(checkpoint, args.device, torch.float32), adapter)
    exact_logits = logits_of(exact, held_out)
    accelerated_logits = logits_of(model, held_out)
    gk.decelerate(model)
    plain_logits = logits_of(model, held_out)

    path = args.out / "four_bit.safetensors"
    model = build_decoder().to(args.device)
    model = gk.quantize(model, "nf4", double_quant=True)
    model = gk.inject(model, gk.GLoRAConfig(A="vector", B="lora", C="vector", E="vector", rank=8, alpha=16))
    glora_losses = train(model, windows, args, "GLoRA over NF4")
    gk.save_adapter(model, path)
    trained = logits_of(model, held_out)

    fresh = gk.quantize(build_decoder().to(args.device), "nf4", double_quant=True)
    fresh = gk.load_adapter(fresh, path)
    reloaded = logits_of(fresh, held_out)

    report = gk.merge(model, requantize=True)
    print("\nmerged into 4 bits again, and what that loses:")
    print(str(report).splitlines()[0], str(report).splitlines()[-1], sep="\n")

    print_table(
        [
            ("check", "largest difference"),
            ("loss by step, bf16: accelerated, plain PEFT", f"{largest_difference(losses, plain_losses):.1e}"),
            (
                "logits: accelerated in bf16, PEFT in fp32",
                f"{largest_difference(accelerated_logits, exact_logits):.1e}",
            ),
            ("logits: plain PEFT in bf16, PEFT in fp32", f"{largest_difference(plain_logits, exact_logits):.1e}"),
            ("logits: GLoRA over NF4, loaded again", f"{largest_difference(trained, reloaded):.1e}"),
            ("largest logit", f"{exact_logits.abs().max():.1e}"),
        ]
    )
    curves = {
        "PEFT's QLoRA": plain_losses,
        "accelerated": losses,
        "GLoRA over gk.quantize, other batches": glora_losses,
    }
    draw_losses(curves, "4-bit bases", args.out / "four_bit.png")


if __name__ == "__main__":
    main()
