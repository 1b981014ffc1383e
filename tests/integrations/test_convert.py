"""Checkpoints of PEFT's GLoRA into ours and back: the same outputs in float64, or a reason."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from peft import GloraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glora_kernels.integrations.peft import GLoRAPeftConfig, convert_checkpoint

BASES = {"bias": (True, True), "nobias": (False, False), "mixed": (True, False)}


class Net(nn.Module):
    def __init__(self, biases: tuple[bool, bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 8, bias=biases[0], dtype=torch.float64)
        self.down = nn.Linear(8, 6, bias=biases[1], dtype=torch.float64)
        self.head = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.tanh(self.up(x))))


def trained(base: str, config) -> PeftModel:
    model = get_peft_model(Net(BASES[base]), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter + 0.3 * drawn)
                assert "glora_" in path or "modules_to_save" in path or path.endswith("bias")
    return model


def y_of(model: nn.Module) -> Tensor:
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model(x).detach()


def theirs(**settings) -> GloraConfig:
    return GloraConfig(**{"r": 2, "target_modules": ["up", "down"]} | settings)


def ours(**settings) -> GLoRAPeftConfig:
    forms = {"A": "lora", "B": "lora", "C": "lora", "D": "vector", "E": "vector"}
    return GLoRAPeftConfig(**{"r": 2, "target_modules": ["up", "down"]} | forms | settings)


def loaded(base: str, folder, recwarn, complete: bool = True) -> Tensor:
    """The output of a model with a checkpoint, which has everything that PEFT asks for where it is `complete`."""
    recwarn.clear()
    model = PeftModel.from_pretrained(Net(BASES[base]), folder)
    if complete:
        assert not [w for w in recwarn if "missing" in str(w.message)]
    return y_of(model)


def near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


FORMS = list(itertools.product(("lora", "vector", "constant", "none"), ("lora", "vector", "none"), ("vector", "none")))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("ab", "c", "de"), [*FORMS, ("lora", "vector", "constant")])
def test_from_peft_and_back(tmp_path, recwarn, base, ab, c, de):
    if ab == c == de == "none":
        return  # nothing to train, and nothing to convert
    model = trained(base, theirs(config_A_B=ab, config_C=c, config_D_E=de))
    y = y_of(model)
    model.save_pretrained(tmp_path / "theirs")
    if ab == "none" and base == "nobias":
        with pytest.raises(ValueError, match="no parameter of GLoRA that is not fixed at zero"):
            convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
        return
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    near(loaded(base, tmp_path / "ours", recwarn), y)
    if base == "mixed" and (c, de) != ("none", "none"):
        with pytest.raises(ValueError, match="one setting for all layers"):
            convert_checkpoint(tmp_path / "ours", tmp_path / "back")
        return
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", every_layer_has_bias=base == "bias")
    # Zeros whose size no parameter shows are not in the file; PEFT says so, and has zeros there.
    sizes_shown = ab == "lora" or (base == "bias" and c != "none" and "vector" in (ab, de))
    near(loaded(base, tmp_path / "back", recwarn, complete=sizes_shown), y)


def test_what_is_beside_the_adapter_goes_along(tmp_path, recwarn):
    bias = "glora_only" if hasattr(BaseTuner, "_get_learnable_bias_state_dict") else "none"  # not saved before 0.21
    model = trained("bias", theirs(bias=bias, modules_to_save=["head"], task_type="FEATURE_EXTRACTION"))
    y = y_of(model.base_model)
    model.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    config = GLoRAPeftConfig.from_pretrained(tmp_path / "ours")
    assert config.bias == bias.replace("glora", "gkglora")
    assert (config.modules_to_save, config.task_type) == (["head"], "FEATURE_EXTRACTION")
    assert (config.A, config.B, config.C, config.D, config.E) == ("lora", "lora", "lora", "constant", "constant")
    base = Net(BASES["bias"])
    near(y_of(PeftModel.from_pretrained(base, tmp_path / "ours").base_model), y)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("settings", "base", "message"),
    [
        ({"A": "vector"}, "bias", "A and B in one form, and this checkpoint has A='vector' and B='lora'"),
        ({"E": "constant"}, "bias", "D and E in one form"),
        ({"patterns": {"up": {"r": 3}}}, "bias", "one setting for all layers"),
        ({"alpha": 4.0}, "bias", "no scale"),
        ({"dropout": 0.1}, "bias", "no dropout"),
        ({"variant": "matmul"}, "bias", "the elementwise variant"),
        ({}, "nobias", "drops C, D and E on layers without a bias, as 'down' is here"),
        ({}, "mixed", "drops C, D and E on layers without a bias, as 'down' is here"),
        ({"D": "none", "E": "none"}, "nobias", "does not show whether"),
    ],
)
def test_what_peft_cannot_express(tmp_path, settings, base, message):
    trained(base, ours(**settings)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "ours", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_bad_input(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    trained("bias", theirs()).save_pretrained(source)
    target.mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        convert_checkpoint(source, target)
    target.rmdir()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        convert_checkpoint(tmp_path / "nowhere", target)

    config, file = source / "adapter_config.json", source / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(file)

    def refused(message, values=values, tensors=tensors):
        config.write_text(json.dumps(values))
        save_file(tensors, file)
        with pytest.raises((ValueError, TypeError), match=message):
            convert_checkpoint(source, target)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    place = "base_model.model.up.glora_"
    refused("not known: \\['gamma'\\]", values | {"gamma": 1})
    refused("got 'LORA'", values | {"peft_type": "LORA"})
    refused("is no parameter of GLoRA that is known", tensors=tensors | {place + "F.X": torch.ones(1)})
    refused("the checkpoint has", tensors=tensors | {place + "A.Xd": torch.ones(8, 3)})
    refused("the checkpoint has", tensors={key: value for key, value in tensors.items() if key != place + "B.Xu"})
    refused("the checkpoint has zeros", values | {"config_A_B": "vector"}, _with_zeros(tensors, "A"))

    without_c = {name: value for name, value in values.items() if name != "config_C"}
    refused(r"source: adapter_config\.json has no config_C", without_c)
    refused(r"source: .*'lora', 'vector'", values | {"config_C": ["lora"]})
    refused("holds NaN or inf", tensors=tensors | {place + "B.Xd": torch.full((8, 2), float("nan"))})
    refused("holds NaN or inf", tensors=tensors | {"beside": torch.tensor([float("inf")])})
    refused(r"is torch\.int64", tensors=tensors | {place + "A.Xd": torch.ones(8, 2, dtype=torch.int64)})
    refused("must have 2 dimensions, got shape", tensors=tensors | {place + "A.Xd": torch.ones(8)})
    refused("must have 2 dimensions, got shape", tensors=tensors | {place + "A.Xu": torch.tensor(1.0)})
    refused(r"must have shape \(N, 1\)", tensors=tensors | {place + "E.X": torch.ones(4, 2)})

    # Whole, or not at all.
    config.write_text(json.dumps(values))
    save_file(tensors, file)

    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("glora_kernels.integrations.peft.convert.save_file", fails)
    with pytest.raises(OSError, match="full"):
        convert_checkpoint(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("direction", ["theirs", "ours"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"", "no JSON"),
        ("adapter_config.json", b'{"peft_type": "GLO', "no JSON"),
        ("adapter_config.json", b"\xff\xfe", "no JSON"),
        ("adapter_config.json", b"[" * 100_000, "no JSON"),
        ("adapter_config.json", b'["GLORA"]', "must hold a JSON object"),
        ("adapter_model.safetensors", b"", "no whole safetensors file"),
        ("adapter_model.safetensors", 200, "no whole safetensors file"),
        ("adapter_model.safetensors", -8, "no whole safetensors file"),
        ("adapter_model.safetensors", None, "has no adapter_model"),
    ],
)
def test_files_that_are_damaged(tmp_path, direction, name, content, message):
    source = tmp_path / "source"
    trained("bias", theirs() if direction == "theirs" else ours()).save_pretrained(source)
    file = source / name
    whole = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(whole[:content] if isinstance(content, int) else content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        convert_checkpoint(source, tmp_path / "target")
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _with_zeros(tensors: dict[str, Tensor], letter: str) -> dict[str, Tensor]:
    rest = {key: value for key, value in tensors.items() if f"glora_{letter}." not in key}
    return rest | {f"base_model.model.{name}.glora_{letter}.zeros": torch.zeros(8, 6) for name in ("up", "down")}


def test_another_method(tmp_path):
    get_peft_model(Net(BASES["bias"]), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="peft_type must be 'GLORA' or 'GKGLORA', got 'LORA'"):
        convert_checkpoint(tmp_path / "lora", tmp_path / "target")
