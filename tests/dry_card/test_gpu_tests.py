"""The tests that need a card run on the dry one up to their comparisons: all of them are collected, a sample is run."""

from __future__ import annotations

SAMPLE = (
    "(test_gpu.py and ((real_size and (vector-lora or none-lora)) or rows_and_ranks or beyond)"
    " and not float16) or (grouped and right and 16-) or (four_bit and moving) or (over_depth and merge)"
)


def sampled(expression: str) -> dict[str, int]:
    """The exit status of pytest, and the kernels asked for, of the tests that an expression selects."""
    from dry_card import gpu_tests

    folders = [
        str(gpu_tests.TESTS / name) for name in ("gpu", "csrc", "glora", "grouped", "depth", "four_bit", "runtime")
    ]
    code, kernels = gpu_tests.run([*folders, "-q", "-k", expression])
    return {"code": code, "kernels": kernels}


def test_a_sample_of_the_gpu_tests_runs_on_the_dry_card(on_card):
    found = on_card(sampled, SAMPLE)
    assert found["code"] == 0
    assert found["kernels"] > 100
