"""What the tests of trainers work with: small models from their configurations, real text, and their losses.

Whether two runs have the same losses is decided by the one tolerance (`reference.tolerance`): with the losses of
plain PEFT in float64 as the truth, an accelerated run in float32 may err twice as much as plain PEFT in float32
does, plus 4 machine epsilons of the largest loss. The trainer logs losses in float32, unrounded.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels.reference.tolerance import allowed_error, largest_error

os.environ["HF_HUB_OFFLINE"] = "1"
transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytest.importorskip("accelerate")  # which the Trainer needs

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY, WINDOW, WIDTH = 512, 48, 64
STEPS, BATCH, RATE, SEED = 6, 4, 1e-2, 1
Rows = list[dict[str, Any]]

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * WINDOW,
    "initializer_range": 0.1,  # logits far from uniform: what an adapter does to them is seen in the loss
    "use_cache": False,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 2 * WIDTH,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_BUILDERS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SHAPE)),  # its q, k and v have a bias
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, **_SHAPE)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
}


LORA = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
QUERY_VALUE_DOWN = ["q_proj", "v_proj", "down_proj"]


def glora(a_b: str, c: str, d_e: str, targets: Any = QUERY_VALUE_DOWN, task: str = "CAUSAL_LM") -> Any:
    """PEFT's GLoRA in one of its forms, begun away from zero."""
    return peft.GloraConfig(
        r=4, target_modules=targets, config_A_B=a_b, config_C=c, config_D_E=d_e, init_weights=False, task_type=task
    )


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with fresh weights, the same for every dtype up to rounding."""
    transformers.set_seed(0)
    model = _BUILDERS[name]()
    if name == "qwen2":
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.to(dtype)


def adapt(model: Any, config: Any) -> Any:
    """The model with the adapters of PEFT, from the same random numbers every time."""
    transformers.set_seed(SEED)
    return peft.get_peft_model(model, copy.deepcopy(config))


def model_of(name: str, config: Any, accelerated: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A model with the adapters of PEFT, accelerated or not."""
    model = adapt(build(name, dtype), config)
    return gk.accelerate(model, verbose=False) if accelerated else model


def quantized(folder: Path) -> Any:
    """The LLaMA with its linear layers in NF4, as transformers loads it."""
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32)


def dequantized(folder: Path) -> Any:
    """`quantized`, its layers made dense, in float64."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, dense = quantized(folder), build("llama")
    for path, layer in packed.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.get_submodule(path).weight.data.copy_(weight)
    return dense.double()


def with_adapters_of_lora(model: Any) -> Any:
    """One of our methods, begun at what PEFT's LoRA begins with."""
    lora = adapters(model_of("llama", LORA, accelerated=False))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, _, factor = name.rsplit(".", 3)
            theirs = {"B_down": "lora_A", "B_up": "lora_B"}[factor]
            parameter.data.copy_(lora[f"{path}.{theirs}.default.weight"])
    return model


def with_shared_lora_a(model: Any) -> Any:
    """PEFT's LoRA with the `lora_A` of the first decoder layer in the others too."""
    first, *others = model.base_model.model.model.layers
    for path, module in first.named_modules():
        if path.endswith("lora_A"):
            for layer in others:
                layer.get_submodule(path)["default"].weight = module["default"].weight
    return model


@functools.cache
def _docstrings() -> tuple[Any, tuple[str, ...]]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        module = importlib.import_module("docstring_text")
    finally:
        sys.path.remove(str(EXAMPLES))
    return module, tuple(module.read_docstrings(module.NUMBERS))


def texts(count: int) -> list[str]:
    """Documentation strings of Python's own library."""
    return [text for text in _docstrings()[1] if len(text) > 200][:count]


@functools.cache
def _windows() -> Tensor:
    module, strings = _docstrings()
    tokens = module.Vocabulary(list(strings), VOCABULARY).encode(list(strings))
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def rows(name: str, first: int = 0, count: int = 64) -> Rows:
    """Windows of the text as a model of this name takes them, and a column that no model takes."""
    chosen = _windows()[first : first + count].tolist()
    if name == "t5":
        half = WINDOW // 2
        return [{"input_ids": w[:half], "labels": w[half:], "source": "docstrings"} for w in chosen]
    return [{"input_ids": w, "labels": w, "source": "docstrings"} for w in chosen]


class LossLog(transformers.TrainerCallback):
    """The losses as the trainer logs them, before anything rounds them for printing."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.evaluation: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        assert logs is not None
        if "loss" in logs:
            self.training.append(logs["loss"])
        if "eval_loss" in logs:
            self.evaluation.append(logs["eval_loss"])


@dataclass
class Run:
    """A finished run: the trainer, the loss of each step and each evaluation, and the adapters it ended with."""

    trainer: Any
    log: LossLog
    adapters: dict[str, Tensor]

    @property
    def losses(self) -> Tensor:
        return torch.tensor(self.log.training, dtype=torch.float64)

    @property
    def evaluations(self) -> Tensor:
        return torch.tensor(self.log.evaluation, dtype=torch.float64)


def settings(folder: Path, kind: Any = transformers.TrainingArguments, **changes: Any) -> Any:
    """Arguments of a short run on the CPU that logs every step."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": SEED,
        **changes,
    }
    return kind(**chosen)


def train(trainer: Any, resume: Path | None = None) -> Run:
    """Run a trainer to its end."""
    log = LossLog()
    trainer.add_callback(log)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return Run(trainer, log, adapters(trainer.model))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_served(model: nn.Module) -> None:
    """Every adapted layer of the model runs on our operators."""
    report = gk.acceleration(model)
    assert report.accelerated
    assert not report.kept, report


def excess(found: Tensor, plain: Tensor, truth: Tensor) -> float:
    """The error of losses in units of what is allowed: at most 1 where they are the same to rounding."""
    assert found.shape == plain.shape == truth.shape, (found.shape, plain.shape, truth.shape)
    assert len(found) > 0
    return largest_error(found, truth) / allowed_error(truth, plain, torch.float32)


def check_same(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Losses are plain PEFT's to rounding."""
    assert excess(found, plain, truth) <= 1.0, f"{found - truth} of {truth}, plain PEFT: {plain - truth}"


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors by name, to the last bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
