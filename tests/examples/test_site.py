"""The documentation site: every page has its place, every public name its entry, and the build is strict."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glora_kernels
from glora_kernels import ops, parallel, recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^::: (glora_kernels\S*)$", re.MULTILINE)


def test_the_reference_has_every_public_name() -> None:
    """Entries name the place where an object is defined: by its public name, `inject` would be the module."""
    modules = [glora_kernels, ops, parallel, recipes]
    if importlib.util.find_spec("peft"):
        modules.append(importlib.import_module("glora_kernels.integrations.peft"))
    objects = [getattr(module, name) for module in modules for name in module.__all__ if name != "__version__"]
    wanted = {f"{one.__module__}.{one.__qualname__}" for one in objects if one is not parallel}
    assert wanted == {name for page in (DOCS / "reference").glob("*.md") for name in ENTRY.findall(page.read_text())}


def test_every_page_has_its_place() -> None:
    named = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_page_of_errors_quotes_what_the_package_says() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "glora_kernels").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message in several literals
    quoted = re.findall(r"^\| `(.+?)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert len(quoted) > 30
    assert not [text for text in quoted if text not in source]


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)
    assert process.returncode == 0, process.stderr
    for page in ("index.html", "formula/index.html", "reference/layers/index.html", "search/search_index.json"):
        assert (tmp_path / page).exists(), page
    layers = (tmp_path / "reference" / "layers" / "index.html").read_text()
    assert "y = x (W + s_A" in layers, "docstrings are missing"
    pages = [page.read_text() for page in (tmp_path / "reference").glob("*/index.html")]
    assert not [found for text in pages for found in re.findall(r"[^ >]<em>.{1,40}", text)], (
        "put the pattern in backticks"
    )


def test_every_table_is_one() -> None:
    """A line of dashes with other columns than its head makes text of the whole table."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    for page in pages:
        lines = page.read_text().splitlines()
        for head, dashes in itertools.pairwise(lines):
            if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", dashes):
                cells = re.sub(r"`[^`]*`|\\\|", "", head).count("|")
                assert cells == dashes.count("|"), f"{page.name}: {head}"
