"""Random sequences of what PEFT does to a model, on twins: after each operation both still are one model."""

from __future__ import annotations

import random

import pytest
import torch
from peft import GloraConfig, HiraConfig, LoraConfig
from twins import ADAPTERS, assert_same, step

ALL = ["up", "mix", "down"]


def lora(draw):
    lora_bias = draw.random() < 0.3
    return LoraConfig(
        r=draw.choice([1, 3, 5]), lora_alpha=draw.choice([1, 4, 16]), target_modules=ALL, lora_bias=lora_bias,
        use_rslora=draw.random() < 0.3, use_dora=not lora_bias and draw.random() < 0.2,
        bias="none" if lora_bias else draw.choice(["none", "all", "lora_only"]),
        rank_pattern=draw.choice([{}, {"down": 2}]), alpha_pattern=draw.choice([{}, {"up": 3}]),
    )  # fmt: skip


def hira(draw):
    return HiraConfig(r=draw.choice([1, 4]), target_modules=ALL)


def glora(draw):
    return GloraConfig(
        r=draw.choice([1, 4]), target_modules=["up", "down"], config_C=draw.choice(["lora", "vector", "none"]),
        config_A_B=draw.choice(["lora", "vector", "constant", "none"]),
        config_D_E=draw.choice(["constant", "vector", "none"]),
    )  # fmt: skip


METHODS = {"lora": lora, "hira": hira, "glora": glora}


def scale_all(model, factor):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


def freeze_some(model, draw):
    for name, parameter in model.named_parameters():
        if any(part in name for part in ADAPTERS):
            parameter.requires_grad_(draw.random() < 0.7)


OPERATIONS = {
    "add": lambda model, draw, config: model.add_adapter(f"n{len(model.peft_config)}", config(draw)),
    "set": lambda model, draw, _: model.set_adapter(draw.choice(sorted(model.peft_config))),
    "set two": lambda model, draw, _: model.base_model.set_adapter(
        draw.sample(sorted(model.peft_config), min(2, len(model.peft_config)))
    ),
    "delete": lambda model, draw, _: model.delete_adapter(sorted(set(model.peft_config) - {"default"})[0]),
    "merge": lambda model, draw, _: model.merge_adapter(safe_merge=draw.random() < 0.5),
    "unmerge": lambda model, draw, _: model.unmerge_adapter(),
    "disable": lambda model, draw, _: model.base_model.disable_adapter_layers(),
    "enable": lambda model, draw, _: model.base_model.enable_adapter_layers(),
    "weighted": lambda model, draw, _: model.add_weighted_adapter(
        sorted(model.peft_config)[:2], [0.3, 0.7], f"w{len(model.peft_config)}", combination_type="cat"
    ),
    "scale": lambda model, draw, _: scale_all(model, draw.choice([0.5, 1.5])),
    "freeze": lambda model, draw, _: freeze_some(model, draw),
    "eval": lambda model, draw, _: model.eval(),
    "train": lambda model, draw, _: model.train(),
    "load": lambda model, draw, _: model.load_state_dict(model.state_dict()),
}


def attempt(work):
    """What comes back, and the error by its type and text: PEFT refuses some sequences, and then refuses both twins."""
    try:
        return work(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_operations(twins, x, method, seed):
    config, names = METHODS[method], random.Random(seed).choices(sorted(OPERATIONS), k=14)
    pair = twins(config(random.Random(seed)), bias=bool(seed % 2))
    for number, name in enumerate(names):
        done = names[: number + 1]

        def operate(model, name=name, number=number):
            torch.manual_seed(number)  # the twins draw the same
            return attempt(lambda: OPERATIONS[name](model, random.Random(100 * seed + number), config))[1]

        plain_error, fast_error = pair.both(operate)
        assert plain_error == fast_error, done
        assert list(pair.plain.state_dict()) == list(pair.fast.state_dict()), done
        plain_trained, fast_trained = ([n for n, p in model.named_parameters() if p.requires_grad] for model in pair)
        assert plain_trained == fast_trained, done
        (expected, plain_error), (got, fast_error) = (attempt(lambda model=model: step(model, x)) for model in pair)
        assert plain_error == fast_error, done
        if expected is not None:
            assert_same(got, expected)
    assert pair.calls, "no call reached our operators"
