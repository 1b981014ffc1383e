"""`python -m glora_kernels params`: exact counts on published architectures, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import glora_kernels as gk
from glora_kernels.__main__ import main
from glora_kernels.tools.commands import params
from glora_kernels.tools.commands.models import MODELS, Sizes, skeleton
from glora_kernels.tools.commands.params import methods

PUBLISHED = {
    "llama-7b": (159_907_840, 89_309_184, 75_595_776, 4_997_120),
    "llama-3-8b": (167_772_160, 90_570_752, 82_444_288, 5_242_880),
}
"""LoRA, ShareA, ShareB, ShareAB on every linear at rank 64."""


def count(name: str, sizes: Sizes, rank: int, targets=None):
    return params.count(name, lambda: skeleton(sizes), rank, targets)


def by_method(*args, **options):
    return {row.method: row.parameters for row in count(*args, **options)}


def literal(sizes: Sizes, rank: int, names=None) -> dict[str, int]:
    """The same by arithmetic: R·K of a down and R·N of an up, once or once a layer."""
    h, f, kv = sizes.hidden, sizes.intermediate, sizes.kv
    shapes = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
    shapes |= {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    chosen = {name: shape for name, shape in shapes.items() if names is None or name in names}
    downs, ups = rank * sum(k for _, k in chosen.values()), rank * sum(n for n, _ in chosen.values())
    qkv = rank * sum(k for name, (_, k) in chosen.items() if name in params.QKV)
    every, once = sizes.layers, 1
    return {
        "LoRA": every * (downs + ups), "ShareA": once * downs + every * ups, "ShareB": every * downs + once * ups,
        "ShareAB": once * (downs + ups), "Share-qkv": every * (downs + ups) - (every - 1) * qkv,
    }  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_counts(model):
    found = by_method(model, MODELS[model], 64)
    assert tuple(found.values())[:4] == PUBLISHED[model]
    assert list(found) == ["LoRA", "ShareA", "ShareB", "ShareAB", "Share-qkv"]


@pytest.mark.parametrize(
    ("model", "targets"), [("llama-13b", None), ("llama-3-8b", ["q_proj", "v_proj"]), ("llama-3-8b", ["down_proj"])]
)
def test_the_counts_are_those_of_arithmetic(model, targets):
    expected = literal(MODELS[model], 64, targets)
    if targets == ["down_proj"]:
        del expected["Share-qkv"]  # nothing of q, k and v is adapted
    assert by_method(model, MODELS[model], 64, targets) == expected


def test_the_skeleton_counts_as_the_model_of_transformers():
    """The real LlamaForCausalLM on the meta device, its head left out by inject itself."""
    transformers = pytest.importorskip("transformers")
    sizes = Sizes(hidden=4096, intermediate=14336, layers=2, kv=1024)
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128,
    )  # fmt: skip
    found = by_method("llama", sizes, 8)
    for method, chosen in methods(8, None, ["layers.0.q_proj", "k_proj", "v_proj"]).items():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        linears = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        own = {name: m.weight.shape for name, m in skeleton(sizes).named_modules() if isinstance(m, torch.nn.Linear)}
        assert {name: shape for name, shape in linears.items() if name != "lm_head"} == own
        assert gk.trainable_parameters(gk.inject(model, chosen)) == found[method]


def test_the_bytes_are_those_of_a_file_and_of_adamw(tmp_path):
    sizes = Sizes(hidden=16, intermediate=24, layers=3, kv=8)
    row = next(row for row in count("small", sizes, 4) if row.method == "ShareA")
    model = gk.inject(skeleton(sizes), methods(4, None, [])["ShareA"], adapter_dtype=torch.bfloat16).to_empty(
        device="cpu"
    )
    path = tmp_path / "a.safetensors"
    gk.save_adapter(model, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - 8 - header == row.file_bytes

    trained = [p for p in model.float().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(value.nbytes for value in states) == row.optimizer_bytes


def test_the_table(capsys):
    assert main(["params", "--config", "llama-7b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rank 64, every linear"
    assert [line.split()[2] for line in lines if line.startswith("llama-7b")][:2] == ["159,907,840", "89,309,184"]
    assert "55.9%" in next(line for line in lines if "ShareA " in line)


def test_the_guide_has_what_the_command_counts():
    text = (Path(__file__).parents[2] / "docs" / "sharelora.md").read_text()
    names = {"LLaMA-7B": "llama-7b", "LLaMA-13B": "llama-13b", "LLaMA-3-8B": "llama-3-8b"}
    for shown, name in names.items():
        found = count(name, MODELS[name], 64)
        assert f"| {shown} | {' | '.join(f'{row.parameters:,}' for row in found)} |" in text
    found = count("", MODELS["llama-3-8b"], 64, ["q_proj", "v_proj"])
    assert f"| LLaMA-3-8B, q and v only | {' | '.join(f'{row.parameters:,}' for row in found)} |" in text
    assert f"| {' | '.join(row.method for row in found)} |" in text


def test_other_sizes_and_json(capsys):
    arguments = ["--hidden", "64", "--intermediate", "128", "--layers", "2", "--kv", "16", "--rank", "4"]
    assert main(["params", *arguments, "--targets", "q_proj", "v_proj", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = Sizes(64, 128, 2, 16)
    assert found["models"] == {"custom": vars(sizes)}
    expected = literal(sizes, 4, ["q_proj", "v_proj"])
    assert {row["method"]: row["parameters"] for row in found["rows"]} == expected
    assert all(row["file_bytes"] * 4 == row["optimizer_bytes"] for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "llama-9"], "llama-7b, llama-13b, llama-3-8b, llama-3-70b, vit-b-16; a model on a hub is not"),
        (["--targets", "up"], "'gate_proj', 'k_proj'"),
        (["--hidden", "64"], "--intermediate"),
        (["--config", "llama-7b", "--hidden", "64", "--intermediate", "64"], "give one of them"),
    ],
)
def test_what_is_not_known(arguments, message, capsys):
    assert main(["params", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("params: ")
    assert message in printed.err
