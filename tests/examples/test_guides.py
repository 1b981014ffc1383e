"""The guides in docs/: every script runs, its checks hold, and so does the Python of every page, the README's too."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from helpers import thinned
from torchvision_apart import FOLDER as TIMM
from torchvision_apart import import_torchvision

from glora_kernels.reference.tolerance import FLOOR

for package in ("transformers", "peft", "accelerate", "sklearn", "matplotlib", "tqdm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "guides"
PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = {
    "from-peft-lora": "peft_lora",
    "from-peft-glora": "peft_glora",
    "from-pytorch": "plain_pytorch",
    "from-timm-and-lightning": "timm_lightning",
    "four-bit": "four_bit",
    "several-gpus": "several_processes",
    "parallel": "tensor_parallel",
    "diffusion": "diffusion",
}
"""The guides with a script each; the other pages of docs/ have none."""

WITH_PYTHON = [page for page in (ROOT / "README.md", *PAGES) if "```python" in page.read_text()]
TORCHRUN = (
    "import os; os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')"
)
"""What a program finds that torchrun starts, as the only process of its."""

EPS = torch.finfo(torch.float32).eps
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "false"}
SMOKE = ["--smoke", "--device", "cpu"]


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def numbers(printed: str, row: str) -> list[float]:
    """The numbers at the end of the row of a script's table that begins with `row`."""
    line = next((line for line in printed.splitlines() if line.startswith(row)), None)
    assert line is not None, f"no line {row!r} in\n{printed}"
    return [float(cell) for cell in line.removeprefix(row).split()]


def number(printed: str, row: str) -> float:
    (value,) = numbers(printed, row)
    return value


def check_sum(printed: str, row: str, terms: int = 384) -> None:
    """Float32 logits differ by no more than sums of this many terms, the widest layer's, do in two orders."""
    assert number(printed, row) <= FLOOR * EPS * terms**0.5 * number(printed, "largest logit"), row


def check_losses(printed: str) -> None:
    """The losses of the first steps, about log(1024), differ by their rounding."""
    assert number(printed, "loss by step: accelerated, plain PEFT") <= FLOOR * EPS * math.log(1024)


def programs(page: Path) -> dict[str, str]:
    """The Python blocks of a page as one program, each line where it stands in the page; those of torchrun one each.

    Those of the README are one each as well: a reader takes one of the three.
    """
    found: dict[str, list[str]] = {}
    apart = page == ROOT / "README.md"
    mark, here = None, page.stem
    for number, line in enumerate(page.read_text().splitlines()):
        if line.startswith("```"):
            mark = line.removeprefix("```") if mark is None else None
            here = f"{page.stem}-{number}" if apart or mark == "python torchrun" else page.stem
        elif mark in ("python", "python torchrun"):
            lines = found.setdefault(here, [])
            lines += [""] * (number - len(lines)) + [line]
    for name, lines in found.items():
        if not apart and (name != page.stem or page.stem in ("several-gpus", "parallel")):
            lines[0] = TORCHRUN
    return {name: "\n".join(lines) for name, lines in found.items()}


def can_run(code: str) -> bool:
    packages = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    return installed(*packages - {"timm"}) and bool(TIMM or "timm" not in packages)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of every script and page that runs in one process, in a process of its own."""
    out = tmp_path_factory.mktemp("guides")
    names = ["plain_pytorch", "peft_lora", "peft_glora"]
    names += ["four_bit"] * installed("trl", "datasets", "bitsandbytes")
    names += ["diffusion"] * installed("diffusers")
    names += ["timm_lightning"] * bool(TIMM and installed("lightning"))
    paths = [SCRIPTS / f"{name}.py" for name in names]
    (out / "pages").mkdir()
    for name, code in (item for page in WITH_PYTHON for item in programs(page).items()):
        if can_run(code):
            paths.append(out / "pages" / f"page-{name}.py")  # a script may have the name of its page
            paths[-1].write_text(code)
    failed = {}
    for path in paths:
        log, folder = out / f"{path.stem}.txt", out / f"{path.stem}-files"
        folder.mkdir()
        before = import_torchvision if TIMM and "import timm" in path.read_text() else None
        process = forked.start(path, *SMOKE, "--out", out, out=log, folder=folder, before=before)
        if code := forked.end_of(process, 800):
            failed[path.stem] = code
    logs = "\n".join((out / f"{name}.txt").read_text() for name in failed)
    assert not failed, f"{failed}\n{logs}"
    return out


def test_the_scripts_run_and_their_checks_hold(ran: Path) -> None:
    """One test for all of them: the processes that share their imports are started once."""
    printed = {path.stem: path.read_text() for path in ran.glob("*.txt") if path.stem in GUIDES.values()}
    for name, text in printed.items():
        assert (ran / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert "100%" in text or "10/10" in text, f"{name} shows no progress"

    lora = printed["peft_lora"]
    assert re.search(r"14  lora\.Linear +glora_kernels", lora)
    assert number(lora, "logits: decelerated, loaded by plain PEFT") == 0.0
    check_losses(lora)
    check_sum(lora, "logits: accelerated, loaded by plain PEFT")
    check_sum(lora, "logits: accelerated, merged")

    glora = printed["peft_glora"]
    assert re.search(r"14  glora\.GloraLinear +glora_kernels", glora)
    for row in ("logits: full GLoRA, loaded again", "logits: disabled, base model"):
        assert number(glora, row) == 0.0, row
    check_losses(glora)
    for row in ("accelerated, plain PEFT", "accelerated, converted to GLoRAPeftConfig", "full GLoRA, merged"):
        check_sum(glora, f"logits: {row}")

    plain = printed["plain_pytorch"]
    for row in ("saved and loaded into the base model", "merged and unmerged"):
        assert number(plain, row) == 0.0, row
    assert number(plain, "what the adapters add") > 1.0 > 1e-3 > number(plain, "merged") > 0.0
    before, after = map(int, re.findall(r"(\d+)%", plain.splitlines()[-2]))
    assert after > before + 30


@pytest.mark.skipif(not installed("trl", "datasets", "bitsandbytes"), reason="trl, datasets or bitsandbytes is missing")
def test_four_bit(ran: Path) -> None:
    printed = (ran / "four_bit.txt").read_text()
    assert re.search(r"14  lora\.Linear4bit +glora_kernels", printed)
    assert number(printed, "logits: GLoRA over NF4, loaded again") == 0.0
    largest = number(printed, "largest logit")
    allowed = 2 * number(printed, "logits: plain PEFT in bf16, PEFT in fp32") + 4 * 2**-8 * largest
    assert 0.0 < number(printed, "logits: accelerated in bf16, PEFT in fp32") <= allowed


@pytest.mark.skipif(not installed("diffusers"), reason="diffusers is missing")
def test_diffusion(ran: Path) -> None:
    printed = (ran / "diffusion.txt").read_text()
    for model in ("unet", "flux"):
        for method in ("GLoRA", "LoRA"):
            trained, before, after, loaded, merged = numbers(printed, f"{model}, {method} ")
            assert trained > 30_000
            assert after < before
            assert loaded == 0.0
            assert 0.0 < merged < 1e-4
            assert (ran / f"diffusion-{model}-{method}.safetensors").exists()


@pytest.mark.skipif(not (TIMM and installed("lightning")), reason="GLORA_KERNELS_TIMM or lightning is missing")
def test_timm_and_lightning(ran: Path) -> None:
    printed = (ran / "timm_lightning.txt").read_text()
    assert "blocks.#.attn.qkv" in printed
    assert number(printed, "Lightning's checkpoint, loaded") == 0.0
    assert number(printed, "the adapter's file, loaded into the base model") == 0.0
    assert 0.0 < number(printed, "merged") < 1e-4


@pytest.mark.parametrize(
    ("launcher", "methods"),
    thinned(  # `accelerate launch` is torchrun's launcher with more variables in the environment
        2,
        [
            pytest.param(
                ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
                ["ddp", "fsdp2", "shared"],
                id="accelerate launch",
            ),
            pytest.param(
                ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
                ["fsdp2", "shared"],
                id="torchrun",
            ),
        ],
    ),
)
def test_two_processes(launcher: list[str], methods: list[str], tmp_path: Path) -> None:
    script = [str(SCRIPTS / "several_processes.py"), *SMOKE, "--out", str(tmp_path)]
    command = [sys.executable, "-m", *launcher, *script, "--methods", *methods]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=400, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for method in methods:
        processes, loss, by_step, loaded = numbers(process.stdout, f"{method} ")
        assert processes == 2.0
        assert 0.0 < loss < 10.0
        assert by_step <= FLOOR * EPS * loss, method
        assert 0.0 <= loaded < 1e-4, method
    assert (tmp_path / "several_processes.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_in_parts(tmp_path: Path) -> None:
    script = [str(SCRIPTS / "tensor_parallel.py"), "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    process = subprocess.run(
        [*command, "--methods", "plan", "shared"], capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=400,
        cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for method in ("plan", "shared"):
        loss, by_step, loaded, counted = numbers(process.stdout, f"{method} ")[-4:]
        assert 0.0 < loss < 10.0
        assert by_step <= FLOOR * EPS * loss, method
        assert 0.0 <= loaded < 1e-4, method
        assert counted == 1.0, method


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_as_a_reader_pastes_it(page: Path, ran: Path) -> None:
    programs = {path.stem: path for path in (ran / "pages").glob(f"page-{page.stem}*.py")}
    if not programs:
        pytest.skip("packages that the page imports are missing")
    for name in programs:
        assert (ran / f"{name}.txt").exists(), name


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_blocks_can_be_pasted(page: Path) -> None:
    """They begin at the margin, in the page and in themselves, and are marked as Python or as a program of torchrun."""
    text = page.read_text()
    assert not re.findall(r"^ +```", text, re.MULTILINE)
    for mark, block in re.findall(r"^```(python.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert mark in ("python", "python torchrun"), mark
        assert not block.startswith((" ", "\n")), block


def test_every_script_has_a_guide() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"guide_parts"}
    assert scripts == set(GUIDES.values())
    for guide, script in GUIDES.items():
        assert f"examples/guides/{script}.py" in (ROOT / "docs" / f"{guide}.md").read_text()


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.stem)
def test_links_and_files_of_a_guide_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    text, _, _ = text.partition("## Add an operator")  # whose files the reader makes
    for path in re.findall(r"\b(?:examples|tests|benchmarks|scripts)/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_page_of_reasons_has_all_of_them() -> None:
    """Read from the sources: importing them imports PEFT."""
    page = (ROOT / "docs" / "what-is-accelerated.md").read_text()
    folder = ROOT / "glora_kernels" / "integrations"
    found = []
    shared = ROOT / "glora_kernels" / "nn" / "mixture.py"
    for path in (folder / "bases.py", shared, *sorted((folder / "accelerated").glob("*.py"))):
        found += re.findall(r"""^[A-Z_0-9]+ = f?"([^"{]+ [^"{]+)""", path.read_text(), re.MULTILINE)
        found += re.findall(r"""^    return f?"([^"{]+ [^"{]+)""", path.read_text(), re.MULTILINE)
    assert len(found) > 20
    assert not [reason for reason in found if reason.strip() not in page]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("[!g]*.py")), ids=lambda path: path.stem)
def test_a_script_explains_itself(script: Path) -> None:
    text = script.read_text()
    assert f"    python examples/guides/{script.name}" in text or f" examples/guides/{script.name}" in text
    assert "if message := missing(" in text, "no clear word about a missing package"
