"""Recipes inside transformers' Trainer and Lightning's: what a checkpoint holds brings the run back exactly."""

import pytest
import torch
import torch.nn.functional as F
from recipe_models import RECIPES, STEPS, K, batch, equal, optimizer_of, ours, values
from torch import nn

import glora_kernels as gk
from glora_kernels.recipes import XGBLoRA, trainer_callback

SAVED = 6
ROWS = [[(x, y) for x, y in zip(*batch(step), strict=True)] for step in range(40)]
"""Rows for a data loader, in batches of 8."""


class WithLoss(nn.Module):
    """What a Trainer calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_of(recipe, model, folder, callbacks=(), accumulated=1, **options):
    transformers = pytest.importorskip("transformers")
    rows = [{"x": x, "labels": y} for own in ROWS[: STEPS * accumulated] for x, y in own]
    optimizer = optimizer_of(model, recipe) if isinstance(recipe, XGBLoRA) else None
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=8, gradient_accumulation_steps=accumulated, max_steps=STEPS,
            save_steps=SAVED, learning_rate=2e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, **options,
        ),
        train_dataset=rows,
        eval_dataset=rows[:16],
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("name", "accumulated"), [
    ("beam", 1), ("dynamic", 2), ("prilora", 2), ("xgb", 1), ("xgb, chain", 1), ("chain", 1), ("chain, base", 1),
])  # fmt: skip
def test_a_run_of_transformers_resumes(name, accumulated, tmp_path):
    def made():
        model = WithLoss(ours(train=["head"]))
        recipe = RECIPES[name](model)
        callback = trainer_callback(recipe)
        return model, recipe, callback

    model, recipe, callback = made()
    options = {"accumulated": accumulated, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(recipe, model, tmp_path, [callback], **options)
    trainer.train()
    assert recipe.step == STEPS

    fresh, resumed, callback = made()
    callback.resume(tmp_path / f"checkpoint-{SAVED}")
    again = trainer_of(resumed, fresh, tmp_path / "again", [callback], **options)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{SAVED}")
    assert losses(again)[SAVED:] == losses(trainer)[SAVED:]
    assert equal(values(fresh), values(model))


def tiny_llama(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": K, "intermediate_size": K, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
    if kind == "ours":
        return gk.inject(model, gk.GLoRAConfig.lora(4, 8), ["q_proj", "v_proj"])
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return gk.accelerate(model, verbose=False)


@pytest.mark.parametrize(("name", "kind"), [
    ("beam", "ours"), ("beam", "accelerated"), ("dynamic", "accelerated"), ("chain, base", "accelerated"),
    ("xgb", "accelerated"),
])  # fmt: skip
def test_a_run_of_a_language_model_resumes(name, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = torch.randint(20, (STEPS * 8, 6), generator=torch.Generator().manual_seed(0))

    def made(folder):
        model = tiny_llama(kind)
        recipe = RECIPES[name](model)
        optimizer = optimizer_of(model, recipe) if isinstance(recipe, XGBLoRA) else None
        callback = trainer_callback(recipe)
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=8, max_steps=STEPS, save_steps=SAVED, learning_rate=2e-2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in words]
        return (
            callback,
            model,
            transformers.Trainer(
                model, arguments, train_dataset=rows, callbacks=[callback], optimizers=(optimizer, None)
            ),
        )

    _, model, trainer = made(tmp_path)
    trainer.train()
    callback, fresh, again = made(tmp_path / "again")
    callback.resume(tmp_path / f"checkpoint-{SAVED}")
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{SAVED}")
    assert losses(again)[SAVED:] == losses(trainer)[SAVED:]
    assert equal(values(fresh), values(model))


def test_a_trainer_that_was_not_resumed_with_its_recipe_is_refused(tmp_path):
    model = WithLoss(ours(train=["head"]))
    recipe = RECIPES["prilora"](model)
    trainer_of(recipe, model, tmp_path, [trainer_callback(recipe)]).train()
    fresh = WithLoss(ours(train=["head"]))
    recipe = RECIPES["prilora"](fresh)
    trainer = trainer_of(recipe, fresh, tmp_path, [trainer_callback(recipe)])
    with pytest.raises(RuntimeError, match=r"callback\.resume"):
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{SAVED}")
