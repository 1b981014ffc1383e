"""`add_weighted_adapter` of the PEFT methods: the sum of what several adapters change, exactly."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig
from glora_kernels.integrations.peft.layer import AdaptedLinear


def model_of(kind, **settings):
    """Two blocks, two adapters of different rank and scale, away from zero."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)) for _ in range(2))).double()
    scaled = settings.get("B", "lora") == "lora"

    def config(r, alpha):
        return kind(r=r, alpha=alpha if scaled else None, target_modules=["0.0", "0.1", "1.0", "1.1"], **settings)

    model = get_peft_model(base, config(2, 3.0), autocast_adapter_dtype=False)
    model.add_adapter("b", config(3, None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_adapter." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return model.eval()


def changes(model, name):
    """What an adapter adds to the output of each layer, of one x."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            x = torch.linspace(-1, 1, 3 * layer.in_features, dtype=torch.float64).view(3, -1)
            layer.set_adapter(name)
            found[path] = (layer(x) - layer.base_layer(x)).detach()
    return found


FORMS = [
    (ShareLoRAPeftConfig, {"share": "A"}),
    (ShareLoRAPeftConfig, {"share": "AB", "A": "vector", "C": "lora", "E": "vector"}),
    (GLoRAPeftConfig, {"A": "lora", "B": "lora", "C": "vector", "D": "vector", "E": "constant"}),
    (GLoRAPeftConfig, {"A": "lora", "variant": "matmul"}),
    (GLoRAPeftConfig, {"A": "constant", "B": "vector", "C": "lora", "D": "constant"}),
]


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_the_sum_of_two_adapters(kind, settings, tmp_path):
    model = model_of(kind, **settings)
    model.add_weighted_adapter(["default", "b"], [0.75, -2.0], "sum")
    one, two, both = (changes(model, name) for name in ("default", "b", "sum"))
    assert len(both) == 4
    for path, change in both.items():
        torch.testing.assert_close(change, 0.75 * one[path] - 2 * two[path], rtol=1e-12, atol=1e-13)
    config = model.peft_config["sum"]
    assert (config.r, config.alpha) == (5, None)
    model.set_adapter("sum")
    if kind is ShareLoRAPeftConfig:
        layers = [model.base_model.model[i][0].adapters["sum"].tensors() for i in range(2)]
        assert layers[0]["B_down"] is layers[1]["B_down"]
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    model.load_adapter(tmp_path / "sum", "again")
    for path, change in changes(model, "again").items():
        torch.testing.assert_close(change, both[path], rtol=1e-12, atol=1e-13)


def test_what_cannot_be_added_up_is_refused():
    model = model_of(GLoRAPeftConfig)
    model.add_adapter("other", GLoRAPeftConfig(A="none", target_modules=["0.0"]))
    model.add_adapter("single", GLoRAPeftConfig(target_modules=["0.0"], patterns={"0.0": {"r": 2}}))
    for arguments, match in (
        ((["default", "b"], [1.0, 1.0], "sum", "svd"), "combination_type must be 'cat'"),
        ((["default", "c"], [1.0, 1.0], "sum"), r"\['c'\] are not among"),
        ((["default", "b"], [1.0, 1.0], "b"), "there is an adapter 'b' already"),
        ((["default", "b"], [1.0], "sum"), "got 2 and 1"),
        ((["default", "other"], [1.0, 1.0], "sum"), r"differ in.*A \('vector' and 'none'\)"),
        ((["single"], [1.0], "sum"), "'single' has patterns="),
    ):
        with pytest.raises(ValueError, match=match):
            model.add_weighted_adapter(*arguments)
        assert "sum" not in model.peft_config
    with pytest.raises(ValueError, match="never change it"):
        model.subtract_mutated_init({}, "b")
