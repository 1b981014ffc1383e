"""PEFT's GLoRA, accelerated; then the GLoRA that PEFT's tuner lacks, as a method of PEFT; and checkpoints converted.

    python examples/guides/peft_glora.py
    python examples/guides/peft_glora.py --steps 60 --device cpu

A LLaMA's linear layers have no bias, so PEFT's GLoRA leaves C, D and E out there. GLoRAPeftConfig gives each support
its own form, has C and E without a bias too, takes other settings for some layers, and trains over 4-bit layers.
"""

from __future__ import annotations

import shutil
import sys

from guide_parts import (
    build_decoder,
    draw_losses,
    largest_difference,
    load_windows,
    logits_of,
    missing,
    parse_arguments,
    print_table,
    train,
)

if message := missing("transformers", "peft"):
    sys.exit(message)

import torch
from peft import GloraConfig, PeftModel, get_peft_model

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig, convert_checkpoint


def add_peft_glora() -> PeftModel:
    """The decoder with GLoRA as PEFT has it: one form for A and B, and nothing else on a layer without a bias."""
    model = build_decoder()
    torch.manual_seed(1)
    config = GloraConfig(r=8, target_modules="all-linear", config_A_B="lora", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return model


def full_glora_config() -> GLoRAPeftConfig:
    """Every support in a form of its own, and in the MLPs LoRA alone, of a smaller rank."""
    return GLoRAPeftConfig(
        r=8,
        alpha=16,
        A="vector",
        B="lora",
        C="vector",
        E="vector",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        patterns={"*.mlp.*": {"A": "none", "C": "none", "E": "none", "r": 4}},
        task_type="CAUSAL_LM",
    )


def main() -> None:
    args = parse_arguments(__doc__, steps=40, smoke=4)
    windows, held_out = (samples := load_windows())[:-8], samples[-8:]
    names = ("peft-glora", "peft-glora-converted", "full-glora")
    theirs, converted, ours = (args.out / name for name in names)
    shutil.rmtree(converted, ignore_errors=True)  # convert_checkpoint writes a new folder only

    plain_losses = train(add_peft_glora().to(args.device), windows, args, "PEFT's GLoRA")

    model = add_peft_glora().to(args.device)
    gk.accelerate(model)
    losses = train(model, windows, args, "accelerated")

    model.save_pretrained(theirs)
    convert_checkpoint(theirs, converted)
    trained = logits_of(model, held_out)
    gk.decelerate(model)
    plain_logits = logits_of(model, held_out)
    loaded = PeftModel.from_pretrained(build_decoder(), converted)
    converted_logits = logits_of(loaded, held_out)

    torch.manual_seed(1)
    model = get_peft_model(build_decoder(), full_glora_config())
    model.to(args.device).print_trainable_parameters()
    full_losses = train(model, windows, args, "full GLoRA")

    model.save_pretrained(ours)
    full_logits = logits_of(model, held_out)
    loaded = PeftModel.from_pretrained(build_decoder(), ours)
    loaded_logits = logits_of(loaded, held_out)
    with model.disable_adapter():
        disabled_logits = logits_of(model, held_out)
    base_logits = logits_of(build_decoder(), held_out)
    merged = model.merge_and_unload()
    merged_logits = logits_of(merged, held_out)

    torch.manual_seed(1)
    four_bit = gk.quantize(build_decoder(), "nf4", double_quant=True)
    four_bit = get_peft_model(four_bit, full_glora_config())
    four_bit_losses = train(four_bit.to(args.device), windows, args, "full GLoRA over NF4")

    print_table(
        [
            ("check", "largest difference"),
            ("loss by step: accelerated, plain PEFT", f"{largest_difference(losses, plain_losses):.1e}"),
            ("logits: accelerated, plain PEFT", f"{largest_difference(trained, plain_logits):.1e}"),
            (
                "logits: accelerated, converted to GLoRAPeftConfig",
                f"{largest_difference(trained, converted_logits):.1e}",
            ),
            ("logits: full GLoRA, loaded again", f"{largest_difference(full_logits, loaded_logits):.1e}"),
            ("logits: full GLoRA, merged", f"{largest_difference(full_logits, merged_logits):.1e}"),
            ("logits: disabled, base model", f"{largest_difference(disabled_logits, base_logits):.1e}"),
            ("largest logit", f"{trained.abs().max():.1e}"),
        ]
    )
    curves = {"PEFT's GLoRA": plain_losses, "accelerated": losses, "full GLoRA": full_losses}
    draw_losses(curves | {"full GLoRA over NF4": four_bit_losses}, "GLoRA under PEFT", args.out / "peft_glora.png")


if __name__ == "__main__":
    main()
