"""The plugin and the comparison over it, on a checkout of seven small tests, and a broken file, in place of PEFT's."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import peft_suite
import pytest

pytest.importorskip("peft")

TESTS = """
import pathlib, peft, pytest, torch
from torch import nn

@pytest.mark.parametrize("config", [peft.LoraConfig, peft.GloraConfig, peft.HiraConfig])
def test_calls(config):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config(target_modules=["0"]))
    model.add_adapter("other", config(target_modules=["0"]))
    assert model(torch.ones(2, 6)).shape == (2, 4)
    with model.disable_adapter():
        model(torch.ones(2, 6))

def test_fails_either_way():
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(5, 4)), peft.LoraConfig(target_modules=["0"]))
    assert model(torch.tensor([1])).shape == (0,)

def test_fails_when_accelerated():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(target_modules=["0"]))
    assert type(model.get_base_model()[0]).__module__ == "peft.tuners.lora.layer"

test_mixed_adapter_batches_lora_with_dora_raises = test_fails_when_accelerated

def test_of_a_model_of_the_hub():
    name = "peft-internal-testing/tiny-random-gpt2"
    assert sorted(path.suffix for path in pathlib.Path(name).iterdir()) == [".json", ".json", ".safetensors"]
"""
PLAIN = {
    **{f"test_calls[{method}Config]": "passed" for method in ("Lora", "Glora", "Hira")},
    "test_fails_either_way": "failed",
    "test_fails_when_accelerated": "passed",
    "test_mixed_adapter_batches_lora_with_dora_raises": "passed",
    "test_of_a_model_of_the_hub": "passed",
}


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys) -> Any:
    """The exit status of the comparison and what it printed. The way without acceleration is known, and not run."""
    tests = tmp_path / "tests"
    tests.mkdir()
    tests.joinpath("__init__.py").touch()
    tests.joinpath("test_small.py").write_text(TESTS)
    tests.joinpath("test_broken.py").write_text("import a_module_that_nobody_has")
    run, plain = peft_suite.run, {f"tests.test_small::{name}": outcome for name, outcome in PLAIN.items()}
    plain |= {"::tests.test_broken": "failed"}
    monkeypatch.setattr(
        peft_suite, "run", lambda *a: run(*a) if a[-1] else peft_suite.Run(plain, Counter[str]())
    )  # fmt: skip

    def compared(*options: str) -> tuple[int, str]:
        kept = ["--keep", str(tmp_path / "kept")]
        status = peft_suite.main(
            [str(tmp_path), "test_small.py", "test_broken.py", "--installed", "--jobs=1", *kept, *options]
        )
        return status, capsys.readouterr().out

    return compared


def test_what_passes_only_without_acceleration_is_found(compare, tmp_path):
    status, printed = compare("-k", "test_small")
    assert status == 1
    differences = re.findall(r"^(\S+): (\w+) without, (\w+) with acceleration(.*)$", printed, re.M)
    name, reason = next(iter(peft_suite.MEANT.items()))
    assert differences == [
        ("tests.test_small::test_fails_when_accelerated", "passed", "failed", ""),
        (f"tests.test_small::{name}", "passed", "failed", f" ({reason})"),
    ]
    assert re.search(r"^all +8 +6 +2 +0 +1$", printed, re.M), printed
    assert "could not be collected, a failed test each: test_broken " in printed
    assert re.findall(r"^ +(\d+)  (\w+)", printed, re.M) == [("3", "glora_kernels"), ("3", "PEFT")]
    assert "AssertionError" in (tmp_path / "kept" / "accelerated.log").read_text()


def test_a_difference_that_is_meant_is_no_failure():
    name = f"tests.test_custom_models.TestMixed::{next(iter(peft_suite.MEANT))}[lora]"
    assert peft_suite.meant(name, "passed", "failed")
    assert not peft_suite.meant(name, "failed", "passed")
    assert not peft_suite.meant(name, "passed", peft_suite.GONE)
    assert not peft_suite.meant("tests.test_custom_models.TestMixed::test_other[lora]", "passed", "failed")


def test_a_selection_without_an_accelerated_call_is_no_success(compare, monkeypatch):
    same = peft_suite.Run({"tests.test_small::test_fails_either_way": "failed"}, Counter[str]())
    monkeypatch.setattr(peft_suite, "run", lambda *_: same)
    status, printed = compare()
    assert status == 1
    assert "no call ran on the operators" in printed


def test_no_checkout(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        peft_suite.main([str(tmp_path)])
    assert "give a checkout of PEFT's repository" in capsys.readouterr().err


def test_a_test_that_ran_in_one_of_the_ways_only_differs():
    assert peft_suite.differences({"a": "passed", "b": "failed"}, {"b": "failed"}) == [("a", "passed", "did not run")]
