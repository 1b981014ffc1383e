"""transformers' `Trainer` over accelerated PEFT models: every loss is plain PEFT's to rounding.

The models are built from configurations, the text is Python's own documentation, and `trainer_models` says how two
runs are compared. Where accelerated runs are compared with each other, they are equal to the last bit.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_models import (
    BATCH,
    LORA,
    QUERY_VALUE_DOWN,
    STEPS,
    Run,
    adapt,
    build,
    check_equal,
    check_same,
    check_served,
    dequantized,
    excess,
    glora,
    model_of,
    peft,
    quantized,
    rows,
    settings,
    train,
    transformers,
    with_adapters_of_lora,
    with_shared_lora_a,
)

import glora_kernels as gk
import glora_kernels.integrations.peft as methods

DROPPED = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")


def run(name: str, model: Any, folder: Path, resume: Path | None = None, **changes: Any) -> Run:
    """Train a model with transformers' Trainer; `changes` are arguments of its TrainingArguments."""
    evaluated = {"eval_dataset": rows(name, 64, 8)} if "eval_strategy" in changes else {}
    trainer = transformers.Trainer(model, settings(folder, **changes), train_dataset=rows(name), **evaluated)
    return train(trainer, resume)


@functools.cache
def plain_lora(dtype: torch.dtype) -> Run:
    """Plain PEFT's LoRA on the LLaMA, which most runs below are compared with."""
    return run("llama", model_of("llama", LORA, accelerated=False, dtype=dtype), Path("unused"))


def check_same_as_plain_lora(found: Run) -> None:
    check_same(found.losses, plain_lora(torch.float32).losses, plain_lora(torch.float64).losses)


CASES = {
    "llama-lora": ("llama", LORA),
    "llama-glora-lora": ("llama", glora("lora", "lora", "constant")),
    "llama-glora-vector": ("llama", glora("vector", "vector", "vector")),
    "llama-hira": ("llama", peft.HiraConfig(r=4, target_modules=QUERY_VALUE_DOWN, task_type="CAUSAL_LM")),
    "qwen2-lora": (
        "qwen2",
        peft.LoraConfig(
            r=8,
            lora_alpha=16,
            use_rslora=True,
            lora_bias=True,
            target_modules="all-linear",
            modules_to_save=["lm_head"],
            task_type="CAUSAL_LM",
        ),
    ),
    "qwen2-glora": ("qwen2", glora("constant", "vector", "vector")),
    "t5-lora": ("t5", peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")),
    "t5-glora": ("t5", glora("vector", "lora", "constant", ["q", "v", "wo"], "SEQ_2_SEQ_LM")),
}


@functools.cache
def losses_without_adapters(name: str) -> Tensor:
    """Of the base alone on the same batches."""
    config = CASES["t5-lora" if name == "t5" else "llama-lora"][1]
    return run(name, model_of(name, config, accelerated=False), Path("unused"), learning_rate=0.0).losses


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_plain_peft(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    truth, plain = (
        run(name, model_of(name, config, accelerated=False, dtype=dtype), tmp_path).losses
        for dtype in (torch.float64, torch.float32)
    )
    model = model_of(name, config, accelerated=True)
    check_served(model)
    found = run(name, model, tmp_path)
    check_same(found.losses, plain, truth)
    assert found.trainer.label_names == ["labels"]  # so an evaluation has a loss
    assert excess(losses_without_adapters(name), plain, truth) > 100.0  # so an error of 1 percent would be noticed


def test_a_wrong_scale_is_noticed(tmp_path: Path) -> None:
    wrong = peft.LoraConfig(r=4, lora_alpha=16.16, target_modules="all-linear", task_type="CAUSAL_LM")
    found = run("llama", model_of("llama", wrong, accelerated=True), tmp_path).losses
    assert excess(found, plain_lora(torch.float32).losses, plain_lora(torch.float64).losses) > 10.0


def test_bf16_autocast(tmp_path: Path) -> None:
    plain, found = (
        run("llama", model_of("llama", LORA, accelerated), tmp_path, bf16=True).losses for accelerated in (False, True)
    )
    truth = plain_lora(torch.float64).losses
    check_same(found, plain, truth)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    model = model_of("llama", LORA, accelerated=True)
    found = run("llama", model, tmp_path, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2)
    check_same_as_plain_lora(found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }

    def of(config: Any, **changes: Any) -> Run:
        model = model_of("llama", config, accelerated=True)
        model.enable_input_require_grads()  # newer releases of transformers do so themselves
        return run("llama", model, tmp_path, **changes)

    found = of(LORA, **checkpointing)
    check_same_as_plain_lora(found)
    assert found.trainer.model.base_model.model.model.layers[0].gradient_checkpointing

    recomputed, stored = of(DROPPED, max_steps=4, **checkpointing), of(DROPPED, max_steps=4)
    assert recomputed.log.training == stored.log.training  # a layer that is run again drops the same elements
    check_equal(recomputed.adapters, stored.adapters)


def test_compiled(tmp_path: Path) -> None:
    """The trainer compiles the model with Dynamo; what backends generate is left to the tests of compilation."""
    model = model_of("llama", LORA, accelerated=True)
    found = run("llama", model, tmp_path, torch_compile=True, torch_compile_backend="eager")
    check_same_as_plain_lora(found)
    check_served(model)


@pytest.mark.parametrize("accelerated", ["before the trainer", "after its optimizer", "in the middle of the run"])
def test_when_it_is_called_does_not_matter(accelerated: str, tmp_path: Path) -> None:
    model = model_of("llama", LORA, accelerated == "before the trainer")
    trainer = transformers.Trainer(model, settings(tmp_path), train_dataset=rows("llama"))
    if accelerated == "after its optimizer":
        trainer.create_optimizer()
        gk.accelerate(trainer.model, verbose=False)
    elif accelerated == "in the middle of the run":
        trainer.add_callback(AccelerateAt(step=3))
    check_same_as_plain_lora(train(trainer))
    check_served(model)


class AccelerateAt(transformers.TrainerCallback):
    """Accelerates the model before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            gk.accelerate(model, verbose=False)


def check_resumed(name: str, make: Any, folder: Path) -> None:
    """A run from the checkpoint in the middle of another ends where that one ends, step by step, to the last bit."""
    middle = STEPS // 2
    whole = run(name, make(), folder, save_strategy="steps", save_steps=middle)
    model = make()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    resumed = run(name, model, folder, folder / f"checkpoint-{middle}")
    assert resumed.log.training == whole.log.training[middle:]
    check_equal(resumed.adapters, whole.adapters)


@pytest.mark.parametrize("case", ["llama-lora-dropped", "qwen2-glora", "t5-glora"])
def test_a_resumed_run_goes_on_as_if_uninterrupted(case: str, tmp_path: Path) -> None:
    name, config = (CASES | {"llama-lora-dropped": ("llama", DROPPED)})[case]
    check_resumed(name, lambda: model_of(name, config, accelerated=True), tmp_path)


def test_a_run_of_plain_peft_is_resumed_accelerated_and_the_other_way_round(tmp_path: Path) -> None:
    for first in (False, True):
        folder = tmp_path / str(first)
        begun = run("llama", model_of("llama", LORA, first), folder, save_strategy="steps", save_steps=STEPS // 2)
        check_same_as_plain_lora(begun)
        resumed = run("llama", model_of("llama", LORA, not first), folder, folder / f"checkpoint-{STEPS // 2}")
        later = slice(STEPS // 2, None)
        check_same(resumed.losses, plain_lora(torch.float32).losses[later], plain_lora(torch.float64).losses[later])


def test_the_best_adapters_are_loaded_and_saved(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    # "Best" is the highest loss: the one after two steps, so there is something to load.
    best_first = {"load_best_model_at_end": True, "greater_is_better": True, "save_strategy": "steps", "save_steps": 2}
    truth, plain = (
        run("llama", model_of("llama", LORA, False, dtype), tmp_path, **evaluated)
        for dtype in (torch.float64, torch.float32)
    )
    model = model_of("llama", LORA, accelerated=True)
    found = run("llama", model, tmp_path, **evaluated, **best_first)
    check_same(found.evaluations, plain.evaluations, truth.evaluations)

    best = found.log.evaluation[0]
    assert best == max(found.log.evaluation)
    assert found.trainer.evaluate()["eval_loss"] == best
    check_served(model)
    model.save_pretrained(tmp_path / "best")
    again = gk.accelerate(peft.PeftModel.from_pretrained(build("llama"), tmp_path / "best"), verbose=False)
    trainer = transformers.Trainer(again, settings(tmp_path), eval_dataset=rows("llama", 64, 8))
    assert trainer.evaluate()["eval_loss"] == best


def test_generation_during_evaluation(tmp_path: Path) -> None:
    # Adapters at random: a barely trained model would write the most frequent token only.
    config = peft.LoraConfig(
        r=16, lora_alpha=64, target_modules="all-linear", task_type="SEQ_2_SEQ_LM", init_lora_weights=False
    )
    arguments = settings(
        tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=12
    )
    written = []
    for accelerated in (False, True):
        trainer = transformers.Seq2SeqTrainer(model_of("t5", config, accelerated), arguments)
        written.append(trainer.predict(rows("t5", 64, 8)).predictions.tolist())
    plain, found = written
    assert found == plain
    assert len({tuple(tokens) for tokens in found}) > 2


def test_four_bit_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "base"
    build("llama").save_pretrained(folder)
    with pytest.raises(ValueError, match="attach trainable adapters"):  # the trainer sees that the base is packed
        run("llama", quantized(folder), tmp_path)

    truth = run("llama", adapt(dequantized(folder), LORA), tmp_path)
    plain, model = (adapt(peft.prepare_model_for_kbit_training(quantized(folder)), LORA) for _ in range(2))
    gk.accelerate(model, verbose=False)
    assert gk.acceleration(model).accelerated == {"lora.Linear4bit": 14}
    found = run("llama", model, tmp_path)
    check_same(found.losses, run("llama", plain, tmp_path).losses, truth.losses)
    check_served(model)


def test_glora_as_a_method_begun_as_lora_trains_like_lora(tmp_path: Path) -> None:
    config = methods.GLoRAPeftConfig(
        r=4, alpha=16, A="none", E="none", target_modules="all-linear", task_type="CAUSAL_LM"
    )
    check_same_as_plain_lora(run("llama", with_adapters_of_lora(adapt(build("llama"), config)), tmp_path))


def test_sharelora_as_a_method_trains_like_lora_with_one_lora_a(tmp_path: Path) -> None:
    truth, plain = (
        run("llama", with_shared_lora_a(model_of("llama", LORA, False, dtype)), tmp_path).losses
        for dtype in (torch.float64, torch.float32)
    )
    config = methods.ShareLoRAPeftConfig(r=4, alpha=16, share="A", target_modules="all-linear", task_type="CAUSAL_LM")
    found = run("llama", with_adapters_of_lora(adapt(build("llama"), config)), tmp_path).losses
    check_same(found, plain, truth)
    assert excess(plain_lora(torch.float32).losses, plain, truth) > 100.0  # sharing is seen


def test_glora_of_peft_converted_trains_the_same(tmp_path: Path) -> None:
    name, config = CASES["qwen2-glora"]
    truth, plain = (
        run(name, model_of(name, config, False, dtype), tmp_path).losses for dtype in (torch.float64, torch.float32)
    )
    model_of(name, config, accelerated=False).save_pretrained(tmp_path / "theirs")
    methods.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours", is_trainable=True)
    check_same(run(name, model, tmp_path).losses, plain, truth)


@pytest.mark.parametrize("method", ["GLoRAPeftConfig", "ShareLoRAPeftConfig"])
def test_a_run_of_our_methods_is_resumed(method: str, tmp_path: Path) -> None:
    config = getattr(methods, method)(r=4, alpha=16, dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    check_resumed("llama", lambda: adapt(build("llama"), config), tmp_path)
