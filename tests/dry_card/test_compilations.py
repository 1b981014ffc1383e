"""How many kernels a layer compiles as what it is called with changes. Counted as the JIT asks; nothing is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

ROWS = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 500, 511, 512, 513,
        700, 1000, 1024, 1025, 1500, 2000, 2047, 2048, 2049, 3000, 4000, 4096, 4097, 6000, 8191, 8192]  # fmt: skip
RANKS = [16, 8, 4, 1, 2, 12, 24, 32, 48, 64, 128, 256]
MOST = {"rows": 12, "ranks": 20, "alpha": 6, "dropout p": 6, "seed": 6, "second layer": 6}
"""Kernels in all, of which a LoRA layer's first call takes six."""


Study = list[tuple[Any, list[str], list[str]]]
"""Of every value: the kernels that it asked to be compiled, and what is wrong with them."""


def asked(studies: list[str], compiles: bool) -> dict[str, Study]:
    import dataclasses

    from triton.runtime.errors import TritonError

    from dry_card import card, forms

    def study(values: Iterable[Any], call: Callable[[Any], None]) -> Study:
        found, so_far = [], 0
        with card.compilations(compiles) as names:
            for value in values:
                faults = []
                with card.recorded() as log:
                    try:
                        call(value)
                    except (RuntimeError, TritonError) as error:  # what no card can hold
                        faults.append(str(error))
                faults += [f"{e.name} spills {e.local_bytes} bytes" for e in log if e.local_bytes]
                found.append((value, names[so_far:], faults))
                so_far = len(names)
        return found

    plain, dropping = forms.layer(), forms.layer(forms.CONFIGS["LoRA, dropout"])

    def call(layer, m: int = 512) -> None:
        forms.step(layer, forms.tensor(m, 4096, grad=True))

    def configured(**changed: Any) -> None:
        call(forms.layer(dataclasses.replace(forms.LORA, **changed)))

    def of_rank(rank: int) -> None:
        configured(rank=rank, alpha=2 * rank)

    known: dict[str, tuple[Iterable[Any], Callable[[Any], None]]] = {
        "rows": (ROWS, lambda m: call(plain, m)),
        "ranks": (RANKS, of_rank),
        "alpha": ([32, 16, 1, 64, 7.5, 0.3], lambda alpha: configured(alpha=alpha)),
        "dropout p": ([0.05, 0.1, 0.5, 0.9], lambda p: configured(dropout=p)),
        "seed": (range(8), lambda _: call(dropping)),
        "second layer": (range(2), lambda _: call(forms.layer())),
    }
    return {name: study(*known[name]) for name in studies}


@pytest.mark.parametrize("what", MOST)
def test_compilations(what, on_card):
    # What is not compiled has no handle that could be kept.
    found = on_card(asked, list(MOST), False, GLORA_KERNELS_LAUNCH="slow")[what]
    kernels = sum(len(names) for _, names, _ in found)
    assert kernels <= MOST[what], [(value, Counter(names)) for value, names, _ in found if names]
    assert not any(faults for _, _, faults in found)


def test_what_is_compiled_fits_the_card_and_spills_nothing(on_card):
    """By the quick way, which asks for the same kernels, and for no other."""
    for name, found in on_card(asked, ["rows", "ranks"], True).items():
        assert not {value: faults for value, _, faults in found if faults}, name
        assert sum(len(names) for _, names, _ in found) <= MOST[name]
