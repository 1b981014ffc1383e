"""PEFT's own tests, once as they are and once with every model accelerated: the same ones must pass."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import tiny_models

HERE = Path(__file__).resolve().parent
FILES = (
    "test_custom_models.py", "test_initialization.py", "test_tuners_utils.py", "test_low_level_api.py",
    "test_mixed.py", "test_lora_variants.py", "test_lora_conversion.py", "test_lora_ga.py", "test_loraplus.py",
    "test_lorafa.py", "test_lora_intruders.py", "test_other.py", "test_mapping.py", "test_helpers.py",
    "test_trainable_tokens.py", "test_target_parameters.py", "test_torch_compile.py", "test_xlora.py",
    "test_arrow.py", "test_bdlora.py", "test_velora.py", "test_riemannian_lora.py", "test_vision_models.py",
    "test_integrations.py", "test_incremental_pca.py", "test_config.py",
)  # fmt: skip
"""Where LoRA, GLoRA and HiRA occur. `test_decoder_models.py`, which takes hours, runs when it is named."""
SELECTED = (
    "not vblora and not randlora and not unilora and not tinylora and not adalora and not gralora and not delora and ("
    "lora or hira or not TestPeftCustomModel)"
)
"""Of the tests over every method of PEFT, those of LoRA, GLoRA and HiRA; of the other tests, all."""
MEANT = {
    "test_mixed_adapter_batches_lora_with_dora_raises": "PEFT refuses a batch of several adapters with DoRA",
    "test_target_parameter_result_caching_works": "it counts the calls of PEFT's own parametrization of experts",
}
"""Tests that fail when accelerated, and why: they are of how PEFT computes, or of what PEFT alone refuses."""
GONE = "did not run"
OURS = "glora_kernels"


class Run(NamedTuple):
    """The outcome of each test ("passed", "failed", "skipped") by its id, and the counts of accelerated calls."""

    outcomes: dict[str, str]
    calls: Counter[str]


def outcomes(path: Path) -> dict[str, str]:
    """What pytest wrote to a JUnit file: the outcome of each test. One with an error in its set-up has failed."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        if found.get(name) != "failed":  # an error in its tear-down is a second entry
            found[name] = outcome
    return found


def run(options: argparse.Namespace, folder: Path, accelerated: bool) -> Run:
    """The selected tests in a process of their own; its output goes to a log in `folder`.

    Raises:
        SystemExit: pytest itself failed.
    """
    way = "accelerated" if accelerated else "plain"
    report, calls, log = (folder / f"{way}.{ending}" for ending in ("xml", "json", "log"))
    command = [
        sys.executable, "-m", "pytest", *(str(file) for file in files_of(options)), f"--rootdir={options.checkout}",
        "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "offline", "-k", options.k, f"--junitxml={report}",
        "--continue-on-collection-errors",
        "-W", "default::FutureWarning",  # of a transformers newer than the tests, for which they are errors
    ]  # fmt: skip
    if options.jobs > 1:
        command += ["-n", str(options.jobs), "--dist", "worksteal"]
    paths = [str(HERE), *([] if options.installed else [str(options.checkout / "src")]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    if accelerated:
        command += ["-p", "plugin", f"--calls={calls}"]
    report.unlink(missing_ok=True)
    with open(log, "wb") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode not in (0, 1, 5) or not report.exists():  # 1: some failed; 5: none was selected
        sys.exit(f"{way}: pytest ended with {done.returncode}\n{log.read_text()[-2000:]}")
    counts = json.loads(calls.read_text())["calls"] if accelerated else {}
    return Run(outcomes(report), Counter(counts))


def files_of(options: argparse.Namespace) -> list[Path]:
    return [options.checkout / "tests" / file for file in options.files]


def file_of(name: str) -> str:
    """ "test_mixed" of "tests.test_mixed.TestMixedAdapterTypes::test_delete_adapter", or of "::tests.test_mixed".

    The latter is a file that could not be collected.
    """
    return name.removeprefix("::").partition("::")[0].split(".")[1]


def meant(name: str, before: str, after: str) -> str | None:
    """Why a test passes without and fails with acceleration, where that is as it should be."""
    function = name.rpartition("::")[2].partition("[")[0]
    return MEANT.get(function) if (before, after) == ("passed", "failed") else None


def differences(plain: dict[str, str], accelerated: dict[str, str]) -> list[tuple[str, str, str]]:
    """(id, outcome plain, outcome accelerated) of each test whose outcomes differ."""
    names = sorted(plain.keys() | accelerated.keys())
    pairs = ((name, plain.get(name, GONE), accelerated.get(name, GONE)) for name in names)
    return [(name, a, b) for name, a, b in pairs if a != b]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/test-peft",
        description=__doc__,
        epilog="Exit 0: the same tests passed, failed and were skipped, but for those of how PEFT computes, and calls "
        "ran on the operators; else 1. There is no hub (HF_HUB_OFFLINE=1): the tiny language models are made here, and "
        "what needs more of it fails both ways and does not count. Example: git clone --branch v0.20.0 "
        "https://github.com/huggingface/peft && scripts/test-peft peft test_target_parameters.py, or of DoRA alone: "
        "scripts/test-peft peft test_custom_models.py test_initialization.py test_lora_variants.py -k dora",
    )
    parser.add_argument("checkout", type=Path, help="a checkout of PEFT's repository; its sources are what is tested")
    parser.add_argument("files", nargs="*", default=FILES, help="of its folder tests/ (default: all with such layers)")
    parser.add_argument("-k", default=SELECTED, help="pytest's expression of which tests (default: %(default)s)")
    parser.add_argument("-n", "--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    parser.add_argument("--installed", action="store_true", help="test the installed PEFT instead of the checkout's")
    parser.add_argument("--keep", type=Path, help="a folder for the logs, the reports and the counts")
    options = parser.parse_args(arguments)
    options.checkout = options.checkout.resolve()
    for file in files_of(options):
        if not file.is_file():
            parser.error(f"{file} is no file: give a checkout of PEFT's repository")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return compare(options, folder)


def compare(options: argparse.Namespace, folder: Path) -> int:
    """Run the tests both ways, print a row for each file and what differs, and return the exit status."""
    if names := tiny_models.named_in(files_of(options)):
        tiny_models.build(names, folder)
    plain, accelerated = (run(options, folder, way) for way in (False, True))
    different = differences(plain.outcomes, accelerated.outcomes)
    changed = [found for found in different if not meant(*found)]
    print(f"{'file':40} {'tests':>6} {'passed':>7} {'failed':>7} {'skipped':>8} {'changed':>8}")
    for file in [*sorted({file_of(name) for name in plain.outcomes}), "all"]:
        of_file = [outcome for name, outcome in plain.outcomes.items() if file in (file_of(name), "all")]
        count = Counter(of_file)
        numbers = f"{len(of_file):6} {count['passed']:7} {count['failed']:7} {count['skipped']:8}"
        print(f"{file:40} {numbers} {sum(file in (file_of(name), 'all') for name, _, _ in changed):8}")
    broken = [
        file_of(name) for name, outcome in plain.outcomes.items() if name.startswith("::") and outcome == "failed"
    ]
    if broken:
        print(f"\ncould not be collected, a failed test each: {', '.join(broken)} (--keep FOLDER has the logs)")
    print("\ncalls of accelerated layers")
    for reason, n in accelerated.calls.most_common():
        print(f"{n:9}  {reason if reason == OURS else f'PEFT: {reason}'}")
    for name, before, after in different:
        reason = f" ({why})" if (why := meant(name, before, after)) else ""
        print(f"{name}: {before} without, {after} with acceleration{reason}")
    if not accelerated.calls[OURS]:
        print("no call ran on the operators: this selection tells nothing")
    return 1 if changed or not accelerated.calls[OURS] else 0


if __name__ == "__main__":
    sys.exit(main())
