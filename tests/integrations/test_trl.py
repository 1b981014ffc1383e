"""TRL's `SFTTrainer` over accelerated PEFT models: it wraps the model, or is given a wrapped one; losses are PEFT's.

The trainer tokenizes the text itself (`trainer_models` says which), with byte-pair tokens learned from it. TRL's own
defaults, bfloat16 autocast and activation checkpointing, are on where a test does not say otherwise.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_models import (
    LORA,
    STEPS,
    VOCABULARY,
    WINDOW,
    Run,
    adapt,
    adapters,
    build,
    check_equal,
    check_same,
    check_served,
    dequantized,
    excess,
    glora,
    peft,
    quantized,
    settings,
    texts,
    train,
    transformers,
    with_adapters_of_lora,
    with_shared_lora_a,
)

import glora_kernels as gk
import glora_kernels.integrations.peft as methods

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

datasets.disable_progress_bars()

CONFIGS = {"lora": LORA, "glora": glora("vector", "lora", "constant")}
SINGLE = {"bf16": False, "gradient_checkpointing": False}


@functools.cache
def tokenizer() -> Any:
    """Byte-pair tokens learned from the text."""
    tokenizers = pytest.importorskip("tokenizers")
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<end>", "<pad>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(texts(100), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>", pad_token="<pad>")


@functools.cache
def dataset() -> Any:
    return datasets.Dataset.from_dict({"text": texts(32)})


def sft(model: Any, folder: Path, config: Any = None, **changes: Any) -> Any:
    """The trainer; `config`: of adapters for the trainer to make."""
    arguments = settings(folder, trl.SFTConfig, max_length=WINDOW, **changes)
    return trl.SFTTrainer(
        model,
        arguments,
        train_dataset=dataset(),
        processing_class=tokenizer(),
        peft_config=copy.deepcopy(config),
    )


@functools.cache
def plain(name: str, method: str, dtype: torch.dtype, wrapped: bool = True) -> Tensor:
    """The losses of plain PEFT; its adapters made by `adapt` or by the trainer, which may draw other numbers."""
    if wrapped:
        return train(sft(adapt(build(name, dtype), CONFIGS[method]), Path("unused"), **SINGLE)).losses
    return train(sft(build(name, dtype), Path("unused"), CONFIGS[method], **SINGLE)).losses


def check_same_as_plain(found: Run, name: str, method: str, wrapped: bool = True) -> None:
    literal, truth = (plain(name, method, dtype, wrapped) for dtype in (torch.float32, torch.float64))
    check_same(found.losses, literal, truth)
    check_served(found.trainer.model)


@pytest.mark.parametrize(("name", "method"), [("llama", "lora"), ("llama", "glora"), ("qwen3", "lora")])
def test_the_trainer_makes_the_adapters(name: str, method: str, tmp_path: Path) -> None:
    trainer = sft(build(name), tmp_path, CONFIGS[method], **SINGLE)
    gk.accelerate(trainer.model, verbose=False)
    check_same_as_plain(train(trainer), name, method, wrapped=False)


@pytest.mark.parametrize(("name", "method"), [("qwen3", "lora"), ("llama", "glora")])
def test_the_trainer_gets_a_wrapped_model(name: str, method: str, tmp_path: Path) -> None:
    model = gk.accelerate(adapt(build(name), CONFIGS[method]), verbose=False)
    check_same_as_plain(train(sft(model, tmp_path, **SINGLE)), name, method)


def test_defaults_of_trl(tmp_path: Path) -> None:
    plain_half = train(sft(build("qwen3"), tmp_path, LORA))
    trainer = sft(build("qwen3"), tmp_path, LORA)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    gk.accelerate(trainer.model, verbose=False)
    check_same(train(trainer).losses, plain_half.losses, plain("qwen3", "lora", torch.float64, wrapped=False))
    check_served(trainer.model)


def test_packed_windows_accumulate_gradients(tmp_path: Path) -> None:
    packing = {"packing": True, "packing_strategy": "wrapped", "gradient_accumulation_steps": 2, **SINGLE}

    def losses(accelerated: bool, dtype: torch.dtype) -> Tensor:
        trainer = sft(build("llama", dtype), tmp_path, LORA, **packing)
        if accelerated:
            gk.accelerate(trainer.model, verbose=False)
        return train(trainer).losses

    check_same(losses(True, torch.float32), losses(False, torch.float32), losses(False, torch.float64))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_resumed_run_goes_on_as_if_uninterrupted(use_reentrant: bool, tmp_path: Path) -> None:
    dropped = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}

    def trainer(**changes: Any) -> Any:
        made = sft(build("qwen3"), tmp_path, dropped, **checkpointing, **changes)
        gk.accelerate(made.model, verbose=False)
        return made

    middle = STEPS // 2
    whole = train(trainer(save_strategy="steps", save_steps=middle))
    resumed = train(trainer(), tmp_path / f"checkpoint-{middle}")
    assert resumed.log.training == whole.log.training[middle:]
    check_equal(resumed.adapters, whole.adapters)


def test_glora_given_to_the_trainer_as_a_method(tmp_path: Path) -> None:
    """Begun as PEFT's LoRA it trains like it, and what the trainer saves is loaded by PEFT."""
    config = methods.GLoRAPeftConfig(
        r=4, alpha=16, A="none", E="none", target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = sft(build("llama"), tmp_path, config, **SINGLE)
    with_adapters_of_lora(trainer.model)
    found = train(trainer)
    check_same(found.losses, plain("llama", "lora", torch.float32), plain("llama", "lora", torch.float64))

    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "saved", is_trainable=True)
    check_equal(adapters(again), found.adapters)


def test_sharelora_given_to_the_trainer_as_a_method(tmp_path: Path) -> None:
    """It trains like LoRA with one `lora_A` over depth."""

    def shared(dtype: torch.dtype) -> Tensor:
        return train(sft(with_shared_lora_a(adapt(build("llama", dtype), LORA)), tmp_path, **SINGLE)).losses

    config = methods.ShareLoRAPeftConfig(r=4, alpha=16, share="A", target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = sft(build("llama"), tmp_path, config, **SINGLE)
    with_adapters_of_lora(trainer.model)
    found, literal, truth = train(trainer), shared(torch.float32), shared(torch.float64)
    check_same(found.losses, literal, truth)
    assert excess(plain("llama", "lora", torch.float32), literal, truth) > 100.0  # sharing is seen

    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "saved", is_trainable=True)
    check_equal(adapters(again), found.adapters)


def test_four_bit_base(tmp_path: Path) -> None:
    """TRL makes the adapters of a packed base bfloat16."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "base"
    build("llama").save_pretrained(folder)
    truth = train(sft(dequantized(folder), tmp_path, LORA, **SINGLE))
    literal, trainer = (sft(quantized(folder), tmp_path, LORA) for _ in range(2))
    gk.accelerate(trainer.model, verbose=False)
    found = train(trainer)
    assert {tensor.dtype for tensor in found.adapters.values()} == {torch.bfloat16}
    check_same(found.losses, train(literal).losses, truth.losses)
    check_served(trainer.model)
