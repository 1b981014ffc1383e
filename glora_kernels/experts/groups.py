"""Which rows go to which expert: sorted by expert, and nothing waits for a GPU to know how many each has."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.ways import is_watched


class Groups(NamedTuple):
    """The rows of a step sorted by expert, for all products that have these rows.

    Attributes:
        starts: (E+2,) int32: the first sorted row of each expert, then of the rows that have none, then their number M.
        order: (M,) int64: the place before sorting of each sorted row; None where they came sorted.
        each: how many rows each token has, one behind the other before sorting.
    """

    starts: Tensor
    order: Tensor | None
    each: int = 1

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Groups:
        """Of the experts of every token (T,) or (T, k). A number that is no expert's gives a row without one."""
        flat = index.reshape(-1).to(torch.int64)
        flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
        ordered, order = torch.sort(flat, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(experts + 2, device=flat.device)).to(torch.int32)
        return cls(starts, order, index.shape[1] if index.ndim > 1 else 1)

    @classmethod
    def sorted_by(cls, ends: Tensor, rows: int) -> Groups:
        """Of rows that are sorted: `ends` (E,) is where those of each expert end, the rest of the rows has none."""
        starts = torch.nn.functional.pad(ends.to(torch.int32), (1, 1))
        starts[-1] = rows
        return cls(starts, None)

    @property
    def experts(self) -> int:
        return len(self.starts) - 2

    @property
    def ends(self) -> Tensor:
        """(E,) int32: where the rows of each expert end."""
        return self.starts[1:-1]

    @property
    def tokens(self) -> Tensor | None:
        """The token of each sorted row; None where the rows came sorted."""
        return self.order if self.order is None or self.each == 1 else self.order // self.each

    def gather(self, x: Tensor) -> Tensor:
        """The rows of tokens x (T, K), sorted by expert: (M, K)."""
        return x if (tokens := self.tokens) is None else x[tokens]

    def unsort(self, rows: Tensor) -> Tensor:
        """Sorted rows (M, ·) in the places that they had before."""
        if self.order is None:
            return rows
        places, found = (self.order,), torch.empty_like(rows)
        # `index_copy` would keep the rows for backward; selective checkpoints keep results that nobody overwrites.
        return found.index_put(places, rows) if is_watched(rows) else found.index_put_(places, rows)

    def sum_back(self, rows: Tensor) -> Tensor:
        """For each token the sum of its rows: (M, K) → (T, K)."""
        rows = self.unsort(rows)
        return rows if self.each == 1 else rows.view(-1, self.each, rows.shape[-1]).sum(1)

    def spans(self) -> list[slice]:
        """The sorted rows of each expert; on a GPU it waits for their numbers.

        Raises:
            RuntimeError: under torch.jit.trace, where these would be constants of the trace.
        """
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace would keep how many rows each expert has in this call for all others: use "
                "torch.compile or torch.export"
            )
        starts = self.starts[:-1].tolist()
        return [slice(first, last) for first, last in itertools.pairwise(starts)]

    def expert_of_rows(self, rows: int) -> Tensor:
        """The expert of each of M sorted rows, E for none, (M,) int64."""
        return torch.searchsorted(self.ends, torch.arange(rows, device=self.starts.device), right=True)
