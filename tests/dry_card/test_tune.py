"""The tuner on the dry card: every choice is planned and launched there as on a card; numbers there are none."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

SIZES = (2048, 1024, 512, 16)


def tuned() -> dict[str, object]:
    """A run over all there is to choose, whose results are right whatever they are; its clock is even."""
    from dry_card import card
    from glora_kernels.runtime import configs
    from glora_kernels.runtime.configs import Shape
    from glora_kernels.tools import timing, trials, tune

    steps: list[int] = []

    def timer(contenders, rounds):
        for of_choice in contenders:
            for step in of_choice:
                step()
            steps.append(len(of_choice))
        return [[1.0] * rounds for _ in contenders]

    trials.Data.wrong = lambda *args: ""
    machine = replace(timing.this_gpu(), timer=timer)
    what = tune.tasks([Shape(*SIZES)], configs.TUNED, True, True)
    with card.compilations(False) as asked, tempfile.TemporaryDirectory() as folder:
        result = tune.run(what, "bf16", Path(folder) / "t.json", machine=machine, show=False)
    rows = {f"{outcome.row.what} {outcome.row.shape.m}": list(outcome.row.ms) for outcome in result.outcomes}
    discarded = [reason for outcome in result.outcomes for reason in outcome.discarded]
    return {"failed": result.failed, "discarded": discarded, "rows": rows, "sets": min(steps), "kernels": len(asked)}


def test_everything_is_tried(on_card):
    found = on_card(tuned)
    assert found["failed"] == found["discarded"] == []
    assert len(found["rows"]) == 22
    assert found["rows"]["small_m 16"] == ["default", "chosen"]
    assert found["rows"]["fwd 2048"] == ["default", "chosen"]
    assert found["rows"]["route dx scaled 2048"] == ["fused", "library"]
    assert found["rows"]["4-bit small_m 8"] == ["triton", "workspace"]
    assert found["sets"] >= 2
    assert found["kernels"] > 40
