"""gk.rows on PEFT models: accelerated layers and our methods, in inference and in training, which PEFT refuses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from twins import Net, randomized

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig

ALL = ["up", "mix", "down"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {
        "default": LoraConfig(r=4, target_modules=ALL),
        "wide": LoraConfig(r=9, lora_alpha=3, target_modules=ALL),
        "rs": LoraConfig(r=3, lora_alpha=8, use_rslora=True, target_modules=["up", "mix"]),
        "biased": LoraConfig(r=2, lora_bias=True, target_modules=["down"]),
    },
    "hira": {
        "default": peft.HiraConfig(r=4, target_modules=ALL),
        "wide": peft.HiraConfig(r=6, target_modules=["up", "down"]),
    },
    "glora": {
        "default": GLoRAPeftConfig(r=4, target_modules=ALL),
        "wide": GLoRAPeftConfig(r=7, alpha=3, A="vector", B="lora", C="lora", E="vector", target_modules=ALL),
        "forms": GLoRAPeftConfig(r=2, A="lora", B="vector", D="vector", target_modules=["up", "mix"]),
    },
    "sharelora": {
        "default": ShareLoRAPeftConfig(r=4, target_modules=ALL),
        "wide": ShareLoRAPeftConfig(r=5, alpha=10, target_modules=["up", "down"]),
    },
}


def with_adapters(configs: dict[str, Any], net: nn.Module | None = None, accelerated: bool = True) -> Any:
    torch.manual_seed(0)
    net = (Net() if net is None else net).double()
    model: Any = get_peft_model(net, configs["default"], autocast_adapter_dtype=False)
    for name, config in configs.items():
        if name != "default":
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    randomized(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gk" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return gk.accelerate(model, verbose=False) if accelerated else model


def names_of(configs: dict[str, Any]) -> list[str | None]:
    return [*reversed(configs), None, *configs, *list(configs)[:1]]


def x_of(examples: int) -> Tensor:
    return torch.randn(examples, 5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mixed(model: Any, x: Tensor, names: Sequence[str | None] | Tensor) -> Tensor:
    with gk.rows(model, names):
        y: Tensor = model(x)
    return y


def alone(model: Any, x: Tensor, names: Sequence[str | None]) -> Tensor:
    """y of each example with its adapter active for the whole model."""
    found = []
    for i, name in enumerate(names):
        if name is None:
            with model.disable_adapter():
                found.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            found.append(model(x[i : i + 1]))
    model.set_adapter("default")
    return torch.cat(found)


def near(got: Tensor, wanted: Tensor) -> None:
    assert float((got - wanted).detach().abs().max()) <= 1e-12 * max(1.0, float(wanted.detach().abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_every_example_as_its_adapter_alone(method: str) -> None:
    configs = METHODS[method]
    model, names = with_adapters(configs).eval(), names_of(configs)
    x = x_of(len(names))
    wanted = alone(model, x, names)
    near(mixed(model, x, names), wanted)
    assert gk.adapters(model) == tuple(configs)
    index = torch.tensor([-1 if name is None else list(configs).index(name) for name in names])
    near(mixed(model, x, index), wanted)
    near(mixed(model, x, index[:, None].repeat(1, 5)), wanted)
    plain = gk.decelerate(copy.deepcopy(model)) if method in ("lora", "hira") else model
    near(alone(plain, x, names), wanted)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["names", "index"])
def test_training_equals_a_step_of_each(method: str, kind: str) -> None:
    configs = METHODS[method]
    model, names = with_adapters(configs).train(), names_of(configs)
    separate, x = copy.deepcopy(model), x_of(len(names))
    model.base_model.set_adapter(list(configs))
    given = torch.tensor([-1 if n is None else list(configs).index(n) for n in names]) if kind == "index" else names
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    mixed(model, x, given).square().sum().backward()
    optimizer.step()
    for name in configs:
        separate.set_adapter(name)
        own = torch.optim.AdamW([p for p in separate.parameters() if p.requires_grad], lr=0.01)
        own.zero_grad()
        separate(x[[i for i, other in enumerate(names) if other == name]]).square().sum().backward()
        own.step()
    start, after = dict(with_adapters(configs).named_parameters()), dict(separate.named_parameters())
    moved = 0
    for name, parameter in model.named_parameters():
        near(parameter, after[name])
        moved += not torch.equal(parameter, start[name])
    assert moved == sum(p.requires_grad for p in model.parameters())


def test_an_adapter_without_examples() -> None:
    model, x = with_adapters(METHODS["lora"]).train(), x_of(3)
    model.base_model.set_adapter(list(METHODS["lora"]))
    mixed(model, x, ["wide", None, "wide"]).sum().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {name for name, p in trained if p.grad is not None} == {name for name, _ in trained if ".wide." in name}
    mixed(model, x, torch.tensor([1, -1, 1])).sum().backward()
    assert {name for name, p in trained if p.grad.any()} == {name for name, _ in trained if ".wide." in name}


def test_dropout() -> None:
    configs = {
        "default": LoraConfig(r=4, target_modules=["up"]),
        "drops": LoraConfig(r=4, lora_dropout=0.5, target_modules=["up"]),
    }
    model, x = with_adapters(configs).train(), x_of(1).expand(6, -1, -1)
    y = mixed(model, x, ["default", "drops", None, "default", "drops", "drops"])
    for same, (i, j) in {(True, (0, 3)), (False, (1, 4)), (False, (4, 5)), (False, (0, 2))}:
        assert torch.allclose(y[i], y[j], rtol=0, atol=1e-12) is same
    model.eval()
    near(mixed(model, x, ["drops"] * 6), alone(model, x, ["drops"] * 6))


def test_another_assignment_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    configs = METHODS["lora"]
    model, x = with_adapters(configs).train(), x_of(3)
    model.base_model.set_adapter(list(configs))
    counter = CompileCounter()
    fast: Any = torch.compile(model, backend=counter)
    for names in (["wide", None, "rs"], ["rs", "rs", "wide"], [None, "wide", "rs"]):
        near(mixed(fast, x, names), mixed(model, x, names))
    assert counter.frame_count == 1
    index = torch.tensor([0, 1, 2])
    for places in ([0, 1, 2], [3, -1, 3]):
        index.copy_(torch.tensor(places))
        near(mixed(fast, x, index), mixed(model, x, index))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_scales_that_change() -> None:
    model, x = with_adapters(METHODS["lora"]).eval(), x_of(2)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("wide", 0.25)
    near(mixed(model, x, ["wide", "rs"]), alone(model, x, ["wide", "rs"]))


@pytest.mark.parametrize("method", ["lora", "glora"])
def test_what_is_refused(method: str) -> None:
    model = with_adapters(METHODS[method]).eval()
    x, names = x_of(2), ["wide", None]
    wanted = mixed(model, x, names)
    with gk.rows(model, names):
        with pytest.raises(RuntimeError, match=r"model.up'.*called with more than x \(adapter_names"):
            model.base_model.model.up(x, adapter_names=["wide", "__base__"])
        with model.disable_adapter():
            near(model(x), alone(copy.deepcopy(model), x, [None, None]))
        near(model(x), wanted)
        if method == "lora":
            with pytest.raises(RuntimeError, match=r"decelerate\(\) was called inside rows"):
                gk.decelerate(model)
            near(model(x), wanted)
    with pytest.raises(ValueError, match="no adapter 'nobody'; accepted are 'default', 'wide'"):
        mixed(model, x, ["nobody", None])
    with pytest.raises(ValueError, match=r"names has one entry for each of \(3,\) examples, but '.*up'"):
        mixed(model, x, [None] * 3)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"up' cannot take .* merged; call unmerge_adapter\(\) first"):
        mixed(model, x, names)
    model.unmerge_adapter()
    near(mixed(model, x, names), wanted)
    with gk.rows(model, names):
        model.merge_adapter()
        with pytest.raises(RuntimeError, match="it is merged"):
            model(x)
        model.unmerge_adapter()
        other = copy.deepcopy(model)
    near(other(x), alone(model, x, ["default"] * 2))


def test_a_model_that_is_not_accelerated() -> None:
    plain = with_adapters(METHODS["lora"], accelerated=False)
    with pytest.raises(ValueError, match=r"rows: .*up' is a layer of PEFT \(Linear\) that is not accelerated"):
        mixed(plain, x_of(1), [None])
    with pytest.raises(ValueError, match=r"adapters: .*not accelerated"):
        gk.adapters(plain)


def test_an_adapter_that_the_operators_do_not_take() -> None:
    configs = METHODS["lora"] | {"alora": LoraConfig(r=2, alora_invocation_tokens=[1], target_modules=["up"])}
    model, x = with_adapters(configs).eval(), x_of(2)
    with pytest.raises(RuntimeError, match=r"up' cannot be computed: its adapter 'alora': a variant of LoRA"):
        mixed(model, x, ["alora", "wide"])
    with torch.no_grad():
        near(mixed(model, x, ["rs", "wide"]), alone(model, x, ["rs", "wide"]))


@pytest.mark.parametrize("method", [LoraConfig, GLoRAPeftConfig])
def test_modules_that_each_adapter_has_its_own_of(method: Any) -> None:
    configs = {
        name: method(r=2, target_modules=["up"], modules_to_save=["down"] if name == "whole" else None)
        for name in ("default", "whole")
    }
    model, x = with_adapters(configs).eval(), x_of(2)
    with pytest.raises(ValueError, match=r"rows: '.*down' is .* \(modules_to_save.*\)"):
        mixed(model, x, ["default", "whole"])
    mixed(model.base_model.model.up, x, ["default", "whole"])
