"""`--config`: which kernels serve each layer of a model, from its config.json alone."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import glora_kernels as gk
from glora_kernels.__main__ import main
from glora_kernels.integrations import configs
from glora_kernels.tools.commands import models, warmup
from glora_kernels.tools.commands.printing import Refused

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
MIXTURE = SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**MIXTURE, architectures=["MixtralForCausalLM"]),
    "llama4": lambda: transformers.Llama4TextConfig(**MIXTURE, head_dim=16, architectures=["Llama4ForCausalLM"]),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=32,
        architectures=["ViTForImageClassification"],
    ),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Saves the config.json of a model of `MODELS`, and returns its folder."""

    def save(name):
        MODELS[name]().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def info(capsys, *args, status=0):
    assert main(["info", "--arch", "sm_90", "--tokens", "512", *args]) == status
    return capsys.readouterr().out


def found(capsys, *args):
    return json.loads(info(capsys, *args, "--json"))


def kernels(group, name):
    return [step["kernel"] for step in group[name]["steps"]]


def test_convolutions(capsys, saved):
    patches = "vit.embeddings.patch_embeddings.projection"
    told = found(capsys, "--config", saved("vit"), "--targets", "projection", "fc1")
    conv, linear = sorted(told["groups"], key=lambda group: not group["kernel"])
    assert (conv["layers"], conv["n"], conv["k"], conv["kernel"]) == ([patches], 64, 3, [16, 16])
    assert (conv["operator"], conv["forward"], conv["backward"]) == (None, None, None)
    assert (linear["operator"], linear["kernel"]) == ("glora_linear", [])
    assert "torch.convolution: the vendor's" in info(capsys, "--config", saved("vit"), "--targets", "projection")


def test_a_pointwise_convolution_is_planned_as_a_linear_layer(capsys, monkeypatch):
    def net(config, dtype):
        return torch.nn.Sequential(torch.nn.Conv2d(64, 96, 1, device="meta", dtype=dtype))

    monkeypatch.setattr(models, "build", net)
    (group,) = found(capsys, "--config", "of this test", "--targets", "0")["groups"]
    assert (group["operator"], group["kernel"]) == ("glora_linear", [1, 1])
    assert "where x has its channels last in memory" in group["why"]
    assert kernels(group, "forward") == ["_prepare_kernel", "_glora_fwd_kernel"]


def test_every_layer_of_a_model_is_named(capsys, saved):
    """The layers of the groups and what is untouched are together all modules that have parameters."""
    told = found(capsys, "--config", saved("vit"))
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(MODELS["vit"]())
    own = [m for m in model.modules() if m._parameters and any(p is not None for p in m._parameters.values())]
    assert sum(group["number"] for group in told["groups"] + told["untouched"]) == len(own)
    sizes = {(group["n"], group["k"]): (group["number"], group["bias"]) for group in told["groups"]}
    assert sizes == {(64, 64): (12, True), (96, 64): (3, True), (64, 96): (3, True)}
    why = {row["layers"][0]: row["why"] for row in told["untouched"]}
    assert why["classifier"] == "left out"
    assert why["vit.embeddings.patch_embeddings.projection"] == "convolution"
    assert why["vit.layers.#.layernorm_before"] == "not linear"
    assert told["trainable"] == gk.trainable_parameters(gk.inject(model, gk.GLoRAConfig.lora(16)))


def test_a_group_tells_its_launches_and_why(capsys, saved):
    told = found(capsys, "--config", saved("gpt2"))
    group = next(group for group in told["groups"] if (group["n"], group["k"]) == (192, 64))
    assert group["layers"] == ["transformer.h.#.attn.c_attn"]
    assert (group["operator"], group["base"], group["adapter"]) == ("glora_linear", "bfloat16", "float32")
    assert kernels(group, "forward")[-1] == "_glora_fwd_kernel"
    assert kernels(group, "backward")[-1] == "_glora_dx_kernel"
    assert group["backward"]["decided_by"] == "cost model"
    text = info(capsys, "--config", saved("gpt2"))
    assert max(map(len, text.splitlines())) <= 100
    assert "forward:  2 launches, route fused (cost model): _prepare_kernel, _glora_fwd_kernel" in text


def test_experts(capsys, saved):
    path = saved("mixtral") + "/config.json"
    told = found(capsys, "--config", path)
    assert {group["experts"] for group in told["groups"]} == {0}
    why = {row["layers"][0]: row["why"] for row in told["untouched"]}
    assert why["model.layers.#.mlp.experts.gate_up_proj"] == "experts"
    assert any("experts" in note for note in told["notes"])

    told = found(capsys, "--config", path, "--experts", "--four-bit", "nf4")
    up, down = (group for group in told["groups"] if group["experts"])
    assert (up["layers"], up["number"], up["experts"], up["base"]) == (
        ["model.layers.#.mlp.experts.gate_up_proj"], 3, 4, "nf4",
    )  # fmt: skip
    assert {up["operator"], down["operator"]} == {"expert_glora_linear"}
    assert "_expert_sum_kernel" in kernels(up, "backward"), "dx of a token is the sum over its experts"
    assert "_expert_sum_kernel" not in kernels(down, "backward")
    dense = next(group for group in told["groups"] if not group["experts"])
    assert any("dequantize_kernel" in name for name in kernels(dense, "forward"))
    assert main(["info", "--config", "llama-3-8b", "--experts"]) == 2


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_experts_that_are_computed_one_by_one(dropout, capsys, saved):
    """As `ops.expert_glora_linear` computes them, which would have to know how many rows each has."""
    case = ["--case", "glora:lora,lora,vector,none,none", "--dropout", dropout]
    told = found(capsys, "--config", saved("mixtral"), "--experts", *case)
    up, down = (group for group in told["groups"] if group["experts"])
    for group in (up, down):
        assert "A is lora, so each expert is a call of ops.glora_linear" in group["why"]
        assert ("without the dropped B" in group["why"]) == (dropout != "0")
        assert "_hadamard_grad_kernel" in kernels(group, "backward")
        assert ("_dy_kernel" in kernels(group, "backward")) or dropout != "0"
    product = ["--variant", "matmul", "--case", "glora:lora,lora,none,none,none"]
    told = found(capsys, "--config", saved("mixtral"), "--experts", *product)
    assert any("_expert_product_kernel" in kernels(group, "forward") for group in told["groups"])


def test_experts_of_another_layout_and_what_inject_refuses(capsys, saved):
    path = saved("llama4")
    assert main(["info", "--config", path]) == 2
    assert "'model.layers.0.feed_forward.router'" in capsys.readouterr().err
    why = {row["module"]: row["why"] for row in found(capsys, "--config", path, "--exclude", "router")["untouched"]}
    assert why["Llama4TextExperts"] == "other experts"
    assert why["Llama4Router"] == "left out"


def test_where_pytorch_serves(capsys, saved):
    told = found(capsys, "--config", saved("gpt2"), "--arch", "cpu")
    assert {group["why"] for group in told["groups"]} == {
        "no Triton code for 'cpu' devices: the factored path in plain PyTorch"
    }
    assert all(group["forward"] is None and group["backward"] is None for group in told["groups"])


def test_sharelora(capsys):
    told = found(capsys, "--config", "llama-3-8b", "--share", "A", "--rank", "64")
    assert told["trainable"] == 90_570_752, "as the paper of ShareLoRA counts"
    assert told["untouched"] == []
    assert told["config"]["share"] == "A"


def test_known_names_and_their_shapes(capsys):
    told = found(capsys, "--config", "vit-b-16", "--case", "glora:vector,lora,none,none,none")
    assert [(group["n"], group["k"], group["number"]) for group in told["groups"]] == [
        (2304, 768, 12), (768, 768, 12), (3072, 768, 12), (768, 3072, 12),
    ]  # fmt: skip


def test_other_commands_take_it(capsys, saved):
    path = saved("gpt2")
    assert main(["params", "--config", path, "--rank", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    model = configs.from_config(path, torch.float32)
    assert rows[0]["parameters"] == gk.trainable_parameters(gk.inject(model, gk.ShareLoRAConfig(rank=4, share="none")))
    assert [row["method"] for row in rows] == ["LoRA", "ShareA", "ShareB", "ShareAB"], "GPT-2 has no q, k and v apart"
    assert main(["tune", "--config", path, "--tokens", "512", "--list", "--arch", "sm_90", "--json"]) == 0
    tried = json.loads(capsys.readouterr().out)["tried"]
    assert {(one["shape"]["m"], one["shape"]["n"], one["shape"]["k"]) for one in tried if one["what"] == "fwd"} == {
        (512, 192, 64), (512, 64, 64), (512, 256, 64), (512, 64, 256),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("meta-llama/Llama-3-8B", "a model on a hub is not looked for: download its config.json and give its path"),
        ("broken", "transformers makes no model of"), ("unknown", "transformers makes no model of"),
    ],
)  # fmt: skip
def test_a_model_that_there_is_not(config, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"broken": "{", "unknown": '{"model_type": "no-such-type"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    assert main(["info", "--config", config]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layer", "8x8x8"], "give one of them"), (["--siblings", "8"], "--siblings is of --layer"),
        (["--bias"], "--bias is of --layer"), (["--targets", "nothing"], "matches no module"),
        (["--backend", "cuda"], "give --four-bit too"),
        (["--share", "A", "--case", "glora:vector,none,none,none,none"], "--share shares the factors of B = lora"),
    ],
)  # fmt: skip
def test_questions_that_do_not_fit(args, message, capsys):
    assert main(["info", "--config", "llama-3-8b", *args]) == 2
    assert message in capsys.readouterr().err


def test_without_transformers(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert main(["info", "--config", str(tmp_path)]) == 2
    assert "pip install transformers" in capsys.readouterr().err
    assert isinstance(models.build("llama-7b", torch.bfloat16), torch.nn.Module), "known names need none"


def test_no_code_of_a_model_is_run(tmp_path, capsys):
    """A config with code beside it (`auto_map`) is refused: the code is not imported."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own_config.OwnConfig"}})
    )
    (tmp_path / "own_config.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert main(["info", "--config", str(tmp_path)]) == 2
    assert "transformers makes no model of" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_warmup_says_what_it_lacks(capsys, saved):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["warmup", "--config", saved("gpt2")]) == 2
    assert "PyTorch sees no GPU here; `info --config` says" in capsys.readouterr().err
    assert main(["warmup"]) == 2
    assert "say which model: --config" in capsys.readouterr().err


def test_warmup_runs_a_layer_of_each_kind(capsys, saved):
    parser = argparse.ArgumentParser()
    warmup.add_arguments(parser)
    asked = ["--config", saved("mixtral"), "--dtype", "fp32", "--rank", "4", "--tokens", "3", "5", "--share", "A"]
    with gk.backend("triton"):
        report = warmup.warmed(parser.parse_args(asked), torch.device("cpu"))
    facts = dict(report.facts)
    assert facts["skipped"] == 0
    assert len(facts["kinds"]) == 2  # q and o, k and v; the experts are left as they are
    assert all("forward and backward with 3, 5 tokens" in line for line in facts["kinds"])
    with pytest.raises(Refused, match="no_such"):
        warmup.warmed(parser.parse_args([*asked, "--targets", "no_such"]), torch.device("cpu"))
