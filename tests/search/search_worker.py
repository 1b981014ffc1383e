"""The search of the tests of ledgers, and, run as a script, one of two processes that search together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from fake_net import FakeNet, evaluate, score_of

import glora_kernels as gk

ARGUMENTS = {
    "max_parameters": 90, "population": 9, "generations": 3, "parents": 3, "start": [gk.GLoRAConfig("vector", "none")],
}  # fmt: skip
EVERY = 5
"""Of so many candidates about one fails, and one is NaN."""


def uneven(model):
    score = evaluate(model)
    if int(score * 1e6) % EVERY == 0:
        raise RuntimeError("no luck")
    return float("nan") if int(score * 1e6) % EVERY == 1 else score


def search(path, score=uneven, **others):
    return gk.Search(FakeNet(5), score, path=path, **ARGUMENTS | others)


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    first = folder / "two.jsonl"
    two = search(first)
    with pytest.warns(UserWarning, match="failed"):
        two.run(progress=False)
    assert len(two._net.used) < len(two.finished), "it evaluated all by itself"
    again = search(first)
    assert again.done
    assert [done.candidate for done in again.finished] == [done.candidate for done in two.finished]

    cut = folder / "cut.jsonl"
    if rank == 0:
        cut.write_bytes(first.read_bytes()[:3000])
    with pytest.warns(UserWarning, match="failed"):
        search(cut).run(progress=False)

    many = search(
        folder / "many.jsonl", None, evaluate_many=lambda candidates: [score_of(candidate) for candidate in candidates]
    )
    many.run(progress=False)

    stopped = search(folder / "stopped.jsonl", lambda model: 1 / 0, max_failures=4)
    with pytest.raises(RuntimeError, match="the last 4 candidates failed"):
        stopped.run(progress=False)
    with pytest.raises(ValueError, match=r"is that of another search: seed is 0 there, 3 here"):
        search(first, seed=3)
    with pytest.raises(ValueError, match=r"rank . has another search: seed is"):
        search(None, seed=rank)

    def lost(candidates):
        raise ConnectionError("lost")

    broken = search(None, None, evaluate_many=lost if rank == 1 else lambda cs: [score_of(c) for c in cs])
    with pytest.raises((ConnectionError, RuntimeError), match="lost"):
        broken.run(progress=False)
    assert broken.finished == []
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
