"""`pytest -m gpu` on the dry card, every test up to its comparisons, which hold for whatever numbers.

    python tests/dry_card tests/dry_card/gpu_tests.py [--compile] [arguments of pytest]

Kernels are counted as the JIT asks for them; with --compile they are compiled and launched as well (ten minutes and
more, where Triton's cache is empty). What fails is what a card would stop at before a number is looked at: collection,
a form that the launchers or the JIT refuse, a launch against the card's rules, a host that waits where it may not.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import helpers
import pytest
import torch

from dry_card import card
from glora_kernels.reference import tolerance
from glora_kernels.runtime import program

TESTS = Path(__file__).resolve().parents[1]


ABSENT = {"profiler": "CUPTI", "compiled": "inductor's CUDA half"}
"""What tests of such names need and a CPU build of PyTorch has not."""


class Plugin:
    """A comparison of a test that fails has been reached, which is all that is asked of it."""

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for name, what in ABSENT.items():
                if name in item.name:
                    item.add_marker(pytest.mark.skip(reason=f"needs {what}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        try:
            return (yield)
        except AssertionError as error:
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            if not Path(last).is_relative_to(TESTS):
                raise
            return None


def run(arguments: list[str], compiles: bool = False) -> tuple[int, int]:
    """Pytest's exit status and the number of kernels that were asked for."""
    # Before the tests import them: what compares, and would compute truths for it.
    helpers.check = lambda *args, **options: None
    helpers.same = lambda *args: True
    tolerance.largest_error = lambda *args: 0.0
    torch.equal = lambda *args: True
    # What is not compiled has no handle that could be kept.
    with card.compilations(compiles) as asked, program.launching(cached=compiles):
        code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *arguments], [Plugin()])
    return int(code), len(asked)


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if argument != "--compile"]
    code, kernels = run(chosen or [str(TESTS)], "--compile" in sys.argv)
    print(f"{kernels} kernels asked for, {card.launches()} launches")
    sys.exit(code)
