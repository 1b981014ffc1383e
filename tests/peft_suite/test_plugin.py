"""The plugin and the comparison over it, on a checkout of three tests in place of PEFT's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

RUN = Path(__file__).with_name("run.py")
TESTS = """
import peft, pytest, torch
from torch import nn

CONFIGS = [peft.LoraConfig, peft.GloraConfig, peft.HiraConfig]

@pytest.mark.parametrize("config", CONFIGS)
def test_passes(config):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config(target_modules=["0"]))
    x = torch.ones(2, 6)
    assert torch.allclose(model(x), model.get_base_model()[0].base_layer(x), atol=1e-4)
    model.add_adapter("other", config(target_modules=["0"]))

def test_fails_either_way():
    embedding = nn.Sequential(nn.Embedding(5, 4))
    model = peft.get_peft_model(embedding, peft.LoraConfig(target_modules=["0"]))
    assert model(torch.tensor([1])).shape == (0,)

def test_sees_the_class():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(target_modules=["0"]))
    assert type(model.get_base_model()[0]).__module__ == "peft.tuners.lora.layer"
"""


def compare(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    tests = tmp_path / "tests"
    tests.mkdir()
    tests.joinpath("__init__.py").touch()
    tests.joinpath("test_small.py").write_text(TESTS)
    command = [sys.executable, RUN, tmp_path, "test_small.py", "--installed", "--keep", tmp_path / "kept", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_passes_only_without_acceleration_is_found(tmp_path):
    done = compare(tmp_path, "-k", "small", "--jobs", "1")
    assert done.returncode == 1, done.stderr
    differences = re.findall(r"^(\S+): (\w+) without, (\w+) with acceleration$", done.stdout, re.M)
    assert differences == [("tests.test_small::test_sees_the_class", "passed", "failed")]
    assert re.search(r"^all +5 +4 +1 +0 +1$", done.stdout, re.M), done.stdout
    assert re.search(r"^ +3  glora_kernels$", done.stdout, re.M), done.stdout  # one forward for each method
    log = (tmp_path / "kept" / "accelerated.log").read_text()
    assert "3  glora_kernels" in log
    assert "AssertionError" in log
