"""The command line: what each command prints and returns."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import interpreted

import glora_kernels as gk
from glora_kernels.__main__ import main
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.runtime import configs, environment, extension, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.tools import outputs, selftest, timing, tune
from glora_kernels.tools.commands.bench import row

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
LAYER = ["info", "--layer", "8192x4096x4096", "--arch", "sm_90"]


def out(capsys, *args, status=0):
    assert main(list(args)) == status
    return capsys.readouterr().out


def steps(capsys, *args):
    found = json.loads(out(capsys, *LAYER, "--json", *args))
    return {name: [step["kernel"] for step in found[name]["steps"]] for name in ("forward", "backward")}, found


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    monkeypatch.setenv(environment.TABLES_VARIABLE, str(tmp_path / "tables"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.reload()
    yield
    tables.reload()


def test_info(capsys):
    text = out(capsys, "info")
    for part in ("torch", "cpu", "Triton kernels", "table for", "A lora, product variant"):
        assert part in text
    facts = json.loads(out(capsys, "info", "--json"))
    assert set(facts) >= {"versions", "devices", "built", "tables", "routes", "layers"}
    assert (facts["command"], facts["status"]) == ("info", 0)


def test_info_names_kernels_that_exist(capsys):
    folder = Path(gk.__file__).parent
    known = set(re.findall(r"^def (_\w+_kernel)\(", "".join(p.read_text() for p in folder.rglob("*.py")), re.M))
    named = set(re.findall(r"\b_\w+_kernel\b", out(capsys, "info")))
    assert named <= known
    assert len(named) >= 10


@no_gpu
def test_info_says_which_tables_there_are(capsys, monkeypatch, tmp_path):
    assert "none: every card takes its defaults" in out(capsys, "info")
    shape = Shape(8192, 4096, 4096, 16)
    config = configs.default("fwd", "sm_90", torch.bfloat16, shape) | {"num_stages": 3}
    row = tables.Row("fwd", "bf16", shape, config, {"default": 2.0, "chosen": 1.0})
    tables.write(tables.Table("Card", "sm_90", "2.11.0", "3.6.0", "2026-01-01", (row,)), tmp_path / "card.json")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    tables.reload()
    found = json.loads(out(capsys, "info", "--json"))["tables"][0]
    assert found["entries"] == "1 configurations, 0 routes, 0 of 4-bit layers; torch 2.11.0, triton 3.6.0, 2026-01-01"
    _, found = steps(capsys)
    first = next(step for step in found["forward"]["steps"] if step["kernel"] == "_glora_fwd_kernel")
    assert (first["source"], first["stages"]) == ("shipped table card.json", 3)
    assert all(step["source"] == "default" for step in found["backward"]["steps"])
    (tmp_path / "card.json").write_text("{}")
    assert "unusable: " in out(capsys, "info")
    tables.reload()
    assert main(LAYER) == 2
    assert "device is missing" in capsys.readouterr().err


def test_the_steps_of_lora(capsys):
    names, found = steps(capsys)
    assert names["forward"] == ["_prepare_kernel", "_glora_fwd_kernel"]
    assert names["backward"] == ["_dy_kernel", "_x_kernel", "_finish_kernel", "_glora_dx_kernel"]
    assert (found["forward"]["launches"], found["backward"]["launches"]) == (2, 4)
    for name in ("forward", "backward"):
        for step in found[name]["steps"]:
            path, line = step["file"].rsplit(":", 1)
            text = (environment.Path(tables.__file__).parents[2] / path).read_text().splitlines()
            assert any(f"def {step['kernel']}(" in text[int(line) - 1 + i] for i in range(10)), step
    product = found["forward"]["steps"][1]
    config = configs.default("fwd", "sm_90", torch.bfloat16, Shape(8192, 4096, 4096, 16))
    assert (product["warps"], product["stages"]) == (config["num_warps"], config["num_stages"])
    assert product["blocks"].startswith(f"M={config['rows']} N={config['cols']} K={config['depth']}")
    assert product["features"] == "tma, persistent"
    assert product["grid"] == "132"


def test_a_layer_is_two_files_away_from_its_kernels(capsys):
    root, found = environment.Path(tables.__file__).parents[2], json.loads(out(capsys, *LAYER, "--json"))
    for name in ("forward", "backward"):
        path, line = found[name]["through"].rsplit(":", 1)
        assert path.endswith("glora/triton.py")
        assert (root / path).read_text().splitlines()[int(line) - 1].startswith(f"def {name}(")
    text = out(capsys, *LAYER)
    assert re.search(r"^nn\.GLoRALinear -> \S+/glora/triton\.py:\d+ -> the file of each kernel$", text, re.M)


@pytest.mark.parametrize(
    ("case", "extra", "forward", "backward"),
    [
        ("glora:none,lora,vector,none,none", [], "_wc_kernel", "_c_grad_kernel"),
        ("glora:lora,lora,lora,vector,vector", ["--bias"], "_prepare_kernel", "_hadamard_grad_kernel"),
        ("glora:constant,constant,none,none,constant", [], "_glora_fwd_kernel", "_finish_kernel"),
        ("glora:lora,lora,none,none,none", ["--variant", "matmul", "--rank", "8"], "_prepare_kernel", "_x_kernel"),
        ("glora:none,none,none,none,none", [], "_glora_fwd_kernel", "_glora_dx_kernel"),
    ],
)
def test_the_steps_of_other_cases(case, extra, forward, backward, capsys):
    names, found = steps(capsys, "--case", case, *extra)
    assert forward in names["forward"]
    assert backward in names["backward"]
    assert found["forward"]["route"] in ("fused", "library")
    text = out(capsys, *LAYER, "--case", case, *extra)
    assert all(name in text for both in names.values() for name in both)
    assert "route fused (cost model)" in text or "route library (cost model)" in text


def test_the_library_route_is_shown(capsys, monkeypatch):
    shape = Shape(8192, 4096, 4096, 16)
    rows = (
        tables.Row("route fwd", "bf16", shape, "library", {"fused": 2.0, "library": 1.0}),
        tables.Row("route dx", "bf16", shape, "library", {"fused": 2.0, "library": 1.0}),
    )
    with tables.using(tables.Table("Card", "sm_90", "2", "3", "today", rows)):
        names, found = steps(capsys)
        text = out(capsys, *LAYER)
    assert names["forward"] == ["_added_terms_kernel", "library product 8192x4096x4096, added"]
    assert found["backward"]["route"] == "library"
    assert "forward: 1 launch, 1 library product; route library (given table)" in text


def test_info_says_whether_the_extension_is_built(capsys, monkeypatch):
    monkeypatch.setattr(extension, "why_missing", lambda arch=None: "the CUDA extension is missing: no nvcc was found")
    assert re.search(r"^CUDA extension +the CUDA extension is missing: no nvcc was found$", out(capsys, "info"), re.M)
    monkeypatch.setattr(extension, "why_missing", lambda arch=None: None)
    monkeypatch.setattr(extension, "build_info", lambda: {"archs": ("80", "90"), "nvcc": "13.0"})
    assert re.search(r"^CUDA extension +built for sm_80, sm_90 by nvcc 13\.0", out(capsys, "info"), re.M)


@pytest.mark.parametrize(
    ("backend", "dense", "few"),
    [
        ("triton", "_dequantize_kernel", "_small_m_kernel"), ("cuda", "dequantize_kernel", "small_m_gemv_kernel"),
        ("auto", "_dequantize_kernel", "_small_m_kernel"),
    ],
)  # fmt: skip
def test_the_steps_of_a_4_bit_layer(backend, dense, few, capsys, monkeypatch):
    """On a machine without the extension, whose launches can be planned all the same."""
    monkeypatch.setattr(four_bit, "_available", lambda arch: False)
    extra = ["--four-bit", "nf4", "--backend", backend]
    names, found = steps(capsys, *extra)
    assert names["forward"][0] == dense
    assert dense in names["backward"]
    assert found["four_bit"] == "nf4"
    assert all((environment.Path(tables.__file__).parents[2] / step["file"].split(":")[0]).is_file()
               for name in ("forward", "backward") for step in found[name]["steps"])  # fmt: skip
    text = out(capsys, "info", "--layer", "1x4096x4096", "--arch", "sm_90", "--case", "lora", *extra)
    assert "nf4 base: M=1 tokens" in text
    assert "forward: 1 launch; route few tokens (default)" in text
    assert re.search(rf"^1 +{few} ", text, re.M)
    text = out(capsys, *LAYER, "--case", "glora:lora,lora,vector,none,none", *extra)
    assert f" {dense.replace('_kernel', '_adapted_kernel')} " in text, "W_eff at once"


def test_what_a_table_says_of_4_bits_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(four_bit, "_available", lambda arch: arch == "sm_90")
    rows = (
        tables.Row(tables.DEQUANTIZE, "bf16", Shape(0, 4096, 4096, 0), "triton", {"cuda": 0.2, "triton": 0.1}),
        tables.Row(
            tables.SMALL_M,
            "bf16",
            Shape(8, 4096, 4096, 16),
            "workspace",
            {"cuda": 0.3, "triton": 0.2, "workspace": 0.1},
        ),
    )
    with tables.using(tables.Table("Card", "sm_90", "2", "3", "today", rows)):
        found = json.loads(
            out(capsys, "info", "--layer", "8x4096x4096", "--arch", "sm_90", "--four-bit", "fp4", "--json")
        )
    first = found["forward"]["steps"][0]
    assert (first["kernel"], first["source"]) == ("_dequantize_kernel", "given table")


def kernels(found):
    return {name: [step["kernel"] for step in found[name]["steps"]] for name in ("forward", "backward")}


def test_fused_siblings_are_shown(capsys):
    names, found = steps(capsys, "--siblings", "1024", "1024")
    assert names["forward"] == ["_grouped_fwd_kernel"]
    assert names["backward"] == ["_grouped_dy_kernel", "_grouped_x_kernel", "_finish_kernel", "_grouped_dx_kernel"]
    assert found["siblings"] == [1024, 1024]
    shape = Shape(8192, 4096, 4096, 16)
    row = tables.Row("fwd", "bf16", shape._replace(n=6144), config := configs.default("fwd", "sm_90", torch.bfloat16,
                     shape) | {"num_stages": 3}, {"default": 2.0, "chosen": 1.0})  # fmt: skip
    with tables.using(tables.Table("Card", "sm_90", "2", "3", "today", (row,))):
        _, found = steps(capsys, "--siblings", "1024", "1024")
    first = found["forward"]["steps"][0]
    assert (first["source"], first["stages"]) == ("given table", config["num_stages"])
    assert "N=4096, 1024, 1024, K=4096" in out(capsys, *LAYER, "--siblings", "1024", "1024")
    assert "grouped/triton.py" in found["backward"]["through"]


def test_layers_that_share_factors_are_shown(capsys):
    names, _ = steps(capsys, "--share", "A", "--case", "glora:none,lora,vector,none,vector")
    assert names["forward"] == ["_shift_kernel", *["_prepare_kernel", "_glora_fwd_kernel"] * 2]
    assert names["backward"][-2:] == ["_shared_grad_kernel", "_shift_grad_kernel"]
    assert "_x_kernel" not in names["backward"], "dB_down is made over depth"
    assert "two layers, share=AB: M=8192" in out(capsys, *LAYER, "--share", "AB")


OWN = """
import torch
from torch import nn
import glora_kernels as gk

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.linear(x)

def x(dtype=torch.bfloat16):
    return torch.empty(8, 16, 4096, dtype=dtype)

def peft():
    from peft import LoraConfig, get_peft_model
    return gk.accelerate(get_peft_model(Model(), LoraConfig(r=16, target_modules=["linear"])), verbose=False), x()

def double():
    return Model(), x(torch.float64)

def group():
    return gk.GroupedLoRALinear(4096, (4096, 1024), gk.GLoRAConfig.lora(16), dtype=torch.bfloat16), x()

def nothing():
    return None
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_module", raising=False)


def test_a_module_of_ones_own_is_shown(own, capsys):
    args = ["info", "--arch", "sm_90", "--json", "--module"]
    found = json.loads(out(capsys, *args, "own_module:peft"))
    assert kernels(found)["forward"] == ["_prepare_kernel", "_glora_fwd_kernel"]
    assert kernels(found)["backward"] == ["_dy_kernel", "_x_kernel", "_finish_kernel", "_glora_dx_kernel"]
    assert found["forward"]["steps"][0]["warps"] == 8, "PEFT's adapter is in fp32"
    assert kernels(json.loads(out(capsys, *args, "own_module:group")))["forward"] == ["_grouped_fwd_kernel"]
    assert "own_module:group: x (8, 16, 4096), bfloat16, in training on sm_90" in out(capsys, *args[:3], *args[4:],
                                                                                     "own_module:group")  # fmt: skip


@pytest.mark.parametrize(("name", "message"), [
    ("own_module:nothing", "must return a module and its input on the meta device, got NoneType"),
    ("own_module:double", "the input must be float32, float16 or bfloat16, got torch.float64"),
    ("own_module:absent", "has no attribute 'absent'"), ("no_such_module:f", "No module named"),
    ("own_module", "must be package.module:function"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["info", "tune"])
def test_a_module_that_there_is_not(own, command, name, message, capsys):
    assert main([command, "--module", name]) == 2
    assert message in capsys.readouterr().err


def test_tune_takes_the_shapes_that_a_module_asks_for(own, capsys):
    text = out(capsys, "tune", "--module", "own_module:group", "--list", "--arch", "sm_90")
    assert "on sm_90, bf16" in text
    assert "M=512 N=5120 K=4096 R=16" in text, "the product of the group"
    assert re.search(r"^fwd +rows=", text, re.M)
    assert "route" not in text, "a group has one way"
    text = out(capsys, "tune", "--module", "own_module:peft", "--list", "--arch", "sm_90", "--kernels", "x", "routes")
    assert re.findall(r"^(route \w+) +512 +4096 +4096 +16 ", text, re.M) == ["route fwd", "route dx"]
    assert not re.search(r"^fwd ", text, re.M)


def test_other_cards_and_sizes(capsys):
    text = out(capsys, "info", "--layer", "48x4096x4097", "--arch", "sm_80", "--dtype", "fp16", "--dropout", "0.1")
    assert "tma" not in text
    assert "dropout 0.1" in text
    text = out(capsys, "info", "--layer", "48x4096x4097", "--arch", "sm_90", "--json")
    assert "default for pointers" in text, "rows that TMA cannot read"
    with pytest.warns(UserWarning, match="sm_79"):
        assert "default of an unknown card" in out(capsys, "info", "--layer", "64x64x64", "--arch", "sm_79", "--json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "dora"], "--case must be lora or glora:A,B,C,D,E"),
        (["--case", "glora:lora,lora"], "--case must be lora or glora:A,B,C,D,E"),
        (["--case", "glora:full,lora,none,none,none"], "A must be one of"),
        (["--dropout", "1.5"], "dropout must be a number"),
        (["--rank", "300"], "rank of up to 256"),
        (["--backend", "cuda"], "--backend cuda chooses the kernels of a 4-bit weight: give --four-bit too"),
        (["--siblings", "64", "--share", "A"], "give one of them"),
        (["--siblings", "64", "--case", "glora:vector,lora,none,none,none"], "no GLoRA layers to fuse"),
        (["--share", "A", "--case", "glora:none,vector,none,none,none"], "--share shares the factors of B = lora"),
    ],
)
def test_a_layer_that_there_is_not(args, message, capsys):
    assert main([*LAYER, *args]) == 2
    assert message in capsys.readouterr().err


@no_gpu
def test_tune_needs_a_gpu(capsys):
    assert main(["tune", "--config", "llama-3-8b"]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    assert main(["tune"]) == 2
    assert "--shape MxNxK" in capsys.readouterr().err


def test_tune_lists_without_a_gpu(capsys):
    text = out(capsys, "tune", "--config", "llama-3-8b", "--list", "--arch", "sm_90")
    assert text.count("M=8192") == 4
    assert int(re.search(r"about (\d+) compilations", text).group(1)) > 20
    text = out(
        capsys, "tune", "--shape", "64x32x16", "--shape", "128x32x16", "--list", "--kernels", "x", "--arch", "sm_80"
    )
    assert "M=64 N=32 K=16 R=16" in text
    assert "M=128" in text
    assert not re.search(r"^(fwd|dx) ", text, re.M)
    text = out(capsys, "tune", "--shape", "64x32x16", "--four-bit", "only", "--list", "--arch", "sm_80")
    assert re.findall(r"^4-bit (\w+) +(\d+) +32 +16 ", text, re.M)[:2] == [("dequantize", "0"), ("small_m", "1")]
    assert "configuration" not in text
    assert "4-bit" not in out(capsys, "tune", "--shape", "64x32x16", "--list", "--arch", "sm_80")


@interpreted
def test_tune_says_what_it_gained(capsys, monkeypatch, tmp_path):
    card = timing.Machine("Test Card", "sm_90", "cpu", lambda contenders, rounds: [
        [1.0 / steps[0].__self__.choice["num_stages"]] * rounds for steps in contenders
    ])  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "this_gpu", lambda: card)
    path = tmp_path / "t.json"
    args = ["tune", "--shape", "32x48x64", "--rank", "4", "--dtype", "fp16", "--kernels", "x", "--out", str(path)]
    text = out(capsys, *args)
    assert re.search(r"^x +32x48x64 r=4 .* 25.0% less", text, re.M)
    assert "1 of 1 are faster than the default" in text
    assert tables.read(path).rows[0].choice["num_stages"] == 4
    assert "(measured before)" in out(capsys, *args)
    asked = []

    def stop(what, *args, **kwargs):
        names = {name for name, _ in what}
        kernels = [name for name in configs.TUNED if name in names]
        asked.append((kernels, "route dx" in names, tables.SMALL_M in names))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", stop)
    assert main(args) == 130
    assert str(path) in capsys.readouterr().err
    for more in (["--four-bit"], ["--four-bit", "only"], ["--four-bit", "--kernels", "dx", "routes"]):
        assert main([*args, *more]) == 130
    assert asked == [(["x"], False, False), (["x"], False, True), ([], False, True), (["dx"], True, True)]


def test_bench(capsys):
    text = out(capsys, "bench", "--device", "cpu", "--layer", "16x24x32", "--rank", "2", "--rounds", "3", "--bias")
    rows = re.findall(rf"^(forward[ +\w]*?){5 * ' +([.0-9]+)'}$", text, re.M)
    assert [row[0] for row in rows] == ["forward", "forward + backward"]
    assert all(float(number) > 0 for row in rows for number in row[1:])
    assert main(["bench", "--case", "dora"]) == 2
    assert main(["bench", "--device", "cpu", "--layer", f"{2**30}x{2**30}x{2**30}"]) == 2, "no memory holds it"


def test_the_times_and_the_ratio_of_bench_are_of_one_round():
    """Also on a machine that slows down in some of the rounds, where medians of each would not fit together."""
    generator = random.Random(0)
    for rounds in (1, 2, 7, 20):
        frozen, ours = (
            [generator.choice([0.2, 2.0]) * generator.uniform(0.9, 1.1) for _ in range(rounds)] for _ in "ab"
        )
        a, b, over, low, high = row(frozen, ours)
        assert (a, b) in zip(frozen, ours, strict=True)
        assert over == pytest.approx(b / a, rel=1e-2)
        assert low <= over <= high


def test_outputs_are_tried_first(tmp_path):
    assert outputs.file(tmp_path / "new" / "folder" / "a.json") == tmp_path / "new" / "folder" / "a.json"
    assert outputs.folder(tmp_path / "other").is_dir()
    (tmp_path / "a").touch()
    for wrong, act in (
        (tmp_path, outputs.file),
        (tmp_path / "a", outputs.folder),
        (tmp_path / "a" / "b", outputs.file),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=str(wrong if act is outputs.folder else tmp_path)):
            act(wrong)
    assert not any((tmp_path / "new" / "folder").iterdir())


def test_check_passes_on_this_machine(capsys):
    text = out(capsys, "check", "--device", "cpu", "--quick")
    assert re.search(r"^(\d+) of \1 results passed on cpu \(.*\): \d+ comparisons, \d+ s$", text.splitlines()[-1]), text
    assert re.search(r"^eager +float32 +dA +plain PyTorch", text, re.M)


def test_check_needs_numpy_for_the_interpreter(capsys, monkeypatch):
    monkeypatch.setattr(environment, "interpreting", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "numpy" else object())
    assert main(["check", "--device", "cpu"]) == 2
    assert "needs numpy: pip install numpy, or --quick" in capsys.readouterr().err


def test_check_names_what_fails_last(capsys, monkeypatch):
    rows = [selftest.Row("eager", "float32", "dA", "plain PyTorch", 3, 1.5, 3e-5, 2e-5, "A=constant B=none")]
    monkeypatch.setattr(selftest, "run", lambda *args: rows)
    for more in ([], ["--json"]):
        assert main(["check", "--device", "cpu", "--quick", *more]) == 1
        said = capsys.readouterr()
        assert (said.err if more else said.out).splitlines()[-1] == "FAILED: eager float32 dA (plain PyTorch)"
        if more:
            found = json.loads(said.out)
            assert (found["status"], found["failed"]) == (1, ["eager float32 dA (plain PyTorch)"])
            assert found["results"][0]["case"] == "A=constant B=none"
        else:
            assert re.search(r"\(plain PyTorch\): error 3.000e-05 over 2.000e-05\s+at A=constant\s+B=none", said.out)
            assert "0 of 1 results passed on cpu" in said.out


@no_gpu
@pytest.mark.parametrize("command", ["bench", "check"])
def test_a_gpu_that_is_not_there(command, capsys):
    assert main([command, "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
