"""The examples in the docstrings of public names run, with what the pages of the reference say they begin with."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

import glora_kernels
from glora_kernels import ops

pytest.importorskip("peft")
from glora_kernels.integrations import peft

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
WITHOUT = {
    "AccelerationReport", "FusedReport",  # what `accelerate` and `fuse_siblings` return
    "Supernet", "split_siblings",  # in the examples of `Search` and `fuse_siblings`
    "fully_shard",  # takes several processes: docs/several-gpus.md
    "fuse_cross_attention", "intrinsic_dimensions", "intrinsic_ranks",  # take a whole model
    "GLoRAPeftModel", "ShareLoRAPeftModel",  # what get_peft_model makes
}  # fmt: skip
PUBLIC = {
    name: getattr(module, name)
    for module in (glora_kernels, ops, peft)
    for name in module.__all__
    if callable(getattr(module, name))
}
BEGINNING = re.compile(r"^Examples begin with `(.+)`\.$", re.MULTILINE)


def test_what_has_no_example_is_listed():
    assert {name for name, one in PUBLIC.items() if ">>>" not in (one.__doc__ or "")} == WITHOUT


def test_the_pages_say_what_examples_begin_with():
    pages = [page.read_text() for page in REFERENCE.glob("*.md") if page.stem not in ("recipes", "processes")]
    assert len({tuple(BEGINNING.findall(text)) for text in pages}) == 1


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT))
def test_the_example_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    (beginning,) = BEGINNING.findall((REFERENCE / "layers.md").read_text())
    exec(beginning, known)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]) or "", known, name, None, None)
    found: list[str] = []
    doctest.DocTestRunner().run(example, out=found.append)
    assert example.examples
    assert not found, "".join(found)
