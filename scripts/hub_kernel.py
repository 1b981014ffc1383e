"""Lays the operators out as a kernel of the Hugging Face hub: python scripts/hub_kernel.py OUT.

OUT gets the project that kernel-builder builds (`build.toml`, `flake.nix`, `CARD.md`, `torch-ext/glora_kernels`), from
`hub/` and the package, and the builds themselves, which are Python alone (`build/torch-<backend>`): what
`kernels.get_kernel` loads. The modules are those of the package that `ops` needs, and import each other relatively,
since the hub loads a kernel under a name of its own, several versions beside each other.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "glora_kernels"
OPERATORS = ("four_bit", "glora", "grouped", "multi", "experts")
"""Folders of which every module is taken: `dispatch.common.path_of` imports them by name."""

DATA = ("runtime/direct.c", "runtime/shipped/README.md")
BACKENDS = ("cpu", "cuda", "rocm")
OPS = '''"""The namespace of this build's operators."""

import torch

ops = getattr(torch.ops, "{name}")


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
'''


def main(out: Path) -> None:
    """Write the project and the builds; what was in `out` of them is replaced."""
    project = out / "torch-ext" / "glora_kernels"
    for folder in (out / "torch-ext", out / "build"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "hub", out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for source in modules():
        target = project / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relative(source))
    for name in DATA:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, project / name)
    for backend in BACKENDS:
        build(project, out / "build" / f"torch-{backend}", backend)


def modules() -> list[Path]:
    """The files of the package that `ops` and its operators need, in order."""
    todo = [PACKAGE / "ops.py", *(path for name in OPERATORS for path in (PACKAGE / name).glob("*.py"))]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found and path.parent != PACKAGE.parent and path != PACKAGE / "__init__.py":
            found.add(path)
            todo += [path.parent / "__init__.py", *imported(path)]
    return sorted(found)


def imported(path: Path) -> Iterator[Path]:
    """The files of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "glora_kernels":
            of = PACKAGE.joinpath(*(node.module or "").split(".")[1:])
            for name in (of, *(of / alias.name for alias in node.names)):
                yield from (file for file in (name.with_suffix(".py"), name / "__init__.py") if file.is_file())


def relative(path: Path) -> str:
    """The text of a file whose imports of the package are relative."""
    dots = "." * len(path.relative_to(PACKAGE).parts)
    text = re.sub(
        r"^(\s*from )glora_kernels(?:\.([\w.]+))? import\b", rf"\1{dots}\2 import", path.read_text(), flags=re.M
    )
    left = [node for node in ast.walk(ast.parse(text)) if "glora_kernels" in ast.dump(node)
            and (isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level))]  # fmt: skip
    assert not left, f"{path}: an import of the package that is not written as `from glora_kernels... import`"
    return text


def build(project: Path, to: Path, backend: str) -> None:
    """One build: the modules, the name of their operators, and the metadata."""
    shutil.copytree(project, to, ignore=shutil.ignore_patterns("__pycache__"))
    content = b"".join(path.read_bytes() for path in sorted(to.rglob("*")) if path.is_file())
    name = f"_glora_kernels_{backend}_{hashlib.sha256(content).hexdigest()[:7]}"
    (to / "_ops.py").write_text(OPS.format(name=name))
    files = {path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()}
    digest = {
        path: base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode() for path, file in files.items()
    }
    metadata = {
        "name": "glora-kernels", "id": name, "version": 0, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": digest},
    }  # fmt: skip
    (to / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
