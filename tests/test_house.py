"""The rules of the house: layers import downward only, files stay small, public names are these."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import glora_kernels

ROOT = Path(glora_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = {
    "spec": 0, "modes": 0, "operands": 0, "reference": 1, "quant": 1, "runtime": 2, "tile": 3, "dispatch": 3,
    "four_bit": 4, "glora": 5, "grouped": 6, "depth": 6, "multi": 6, "experts": 6,
    "ops": 7, "nn": 8, "parallel": 8, "search": 9, "integrations": 9,
    "methods": 10, "recipes": 11, "__init__": 12, "tools": 12, "__main__": 12,
}  # fmt: skip
SLICES = ("four_bit", "glora", "grouped", "depth", "multi", "experts")
"""One folder an operator: its launchers under their kernels, its eager twin and its registration beside them."""
PUBLIC = {
    "AccelerationReport", "FusedReport", "GLoRAConfig", "GLoRAConv", "GLoRALinear", "GroupedLoRALinear", "MergeReport",
    "QuantizedLinear", "Search", "SearchSpace", "ShareLoRAConfig", "Supernet", "accelerate", "acceleration", "adapters",
    "add_adapter", "allocate", "backend", "batch_invariant", "clip_grad_norm_", "decelerate", "deferred_shared_grads",
    "delete_adapter", "disabled", "edit_ranks", "fold_mids", "fully_shard", "fuse_cross_attention", "fuse_siblings",
    "inject", "intrinsic_dimensions", "intrinsic_ranks", "linear_ranks", "load_adapter", "merge", "merge_and_unload",
    "mids", "observe", "optimizer", "parallel", "parameter_groups", "quantize", "restart", "rows", "save_adapter",
    "set_adapter", "set_mid", "set_rank", "shared", "shift_once", "snapshot", "split_siblings", "tasks",
    "trainable_parameters", "unload", "unmerge", "using", "warmup", "with_ranks", "__version__",
}  # fmt: skip


def top_level_imports(path: Path) -> set[str]:
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {getattr(node, "module", None) or alias.name for node in body for alias in node.names}


LAUNCHERS = {"_dequantize_adapted_kernel": "dequantize_launch", "_small_h_kernel": "small_m_launch"}
"""Of kernels that share a launcher with another one."""

files = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor(module: str) -> int:
    """The floor of the longest prefix of a module's name that has one."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in FLOORS:
            return FLOORS[".".join(parts[:end])]
    raise AssertionError(f"glora_kernels.{module} has no floor: give it one in FLOORS")


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, at whatever depth, `from package import module` resolved to the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            base = node.module or ""
            for alias in node.names:
                inside = ROOT.parent.joinpath(*base.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").exists()
                found.add(f"{base}.{alias.name}" if is_module else base)
    return found


@files
def test_layers_import_only_downward(path):
    here = floor(module_of(path))
    for name in imports(path):
        if name == "glora_kernels":
            assert here >= FLOORS["tools"], f"{path.name} imports the whole package"
        if name.startswith("glora_kernels."):
            assert floor(name.removeprefix("glora_kernels.")) <= here, f"{path.name} imports {name}, which is above it"


def test_no_module_imports_itself_by_way_of_others():
    found = {f"glora_kernels.{module_of(path)}": imports(path) for path in FILES}
    while ends := {name for name, others in found.items() if not others & found.keys()}:
        found = {name: others for name, others in found.items() if name not in ends}
    assert not found, f"imports that run in a circle, or into one: {sorted(found)}"


@files
def test_the_package_imports_no_test_and_no_framework(path):
    roots = {name.split(".")[0] for name in imports(path)}
    forbidden = {"tests", "benchmarks", "examples", "peft", "transformers", "bitsandbytes", "pytest", "helpers"}
    if module_of(path).split(".")[0] == "integrations":
        forbidden -= {"peft", "transformers", "bitsandbytes"}
    if module_of(path) == "quant.bnb":  # makes bitsandbytes' objects, and imports it only then
        assert not {name for name in top_level_imports(path) if name.startswith("bitsandbytes")}
        forbidden -= {"bitsandbytes"}
    assert not roots & forbidden


def test_the_specification_needs_no_torch():
    assert not {name.split(".")[0] for name in imports(ROOT / "spec.py")} & {"torch", "triton", "numpy"}


@files
def test_triton_is_imported_beside_kernels_only(path):
    module = module_of(path)
    if any(name.split(".")[0] == "triton" for name in imports(path)):
        assert module.split(".")[0] in ("operands", "tile", "runtime", "tools", "__main__", *SLICES), module


@files
def test_tools_are_not_imported_by_what_runs(path):
    if module_of(path).split(".")[0] not in ("tools", "__main__"):
        assert not any(name.startswith("glora_kernels.tools") for name in imports(path)), path


@files
def test_environment_variables_are_read_in_one_module(path):
    if module_of(path) != "runtime.environment":
        assert not re.search(
            r"os\.environ(\.get|\[)|os\.getenv|get_device_properties|get_device_capability", path.read_text()
        )


@files
def test_files_are_short_and_finished(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not re.search(r"except( Exception)?:\s*\n\s*pass\b", text)
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "a module without a docstring"


def test_tests_are_short_too():
    for path in Path(__file__).parent.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_kernels_read_entries_of_structures_and_no_property():
    """Of a structure that is a constant, Triton 3.8 keeps the entries and not its class."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    known = [tree for path, tree in trees.items() if path.name == "operands.py" or "triton" in top_level_imports(path)]
    classes = [n for tree in known for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    tuples = [n for n in classes if any(getattr(base, "id", "") == "NamedTuple" for base in n.bases)]
    assert {"Numerics", "Layout"} <= {n.name for n in tuples}
    properties = {part.name for n in tuples for part in n.body if isinstance(part, ast.FunctionDef)}
    functions = [n for tree in known for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    kernels = [n for n in functions if any("triton.jit" in ast.unparse(one) for one in n.decorator_list)]
    for kernel in kernels:
        reads = {n for n in ast.walk(kernel) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
        found = {ast.unparse(n) for n in reads if n.value.id.isupper() and n.attr in properties}
        assert not found, f"{kernel.name} reads {sorted(found)}"


def test_kernels_are_private_and_their_launchers_stand_beside_them():
    count = 0
    for path in FILES:
        text = path.read_text()
        kernels = re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\(", text, re.M)
        count += len(kernels)
        for name in kernels:
            assert name.startswith("_")
            launcher = LAUNCHERS.get(name, f"{name.removeprefix('_').removesuffix('_kernel')}_launch")
            assert f"def {launcher}(" in text, f"{path}: {launcher} is not in the file of its kernel"
        if "@triton.jit" in text:
            code = re.sub(r'"""[\s\S]*?"""', "", text)
            assert "atomic" not in code, "sums must not differ from run to run"
    assert count >= 20


def test_public_names():
    assert set(glora_kernels.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(glora_kernels, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        glora_kernels.nonsense  # noqa: B018
    assert glora_kernels.__version__.count(".") >= 1
