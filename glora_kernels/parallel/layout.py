"""The sharding table: which dimension of each parameter of a layer is cut over the ranks, and what cannot be cut.

S0, S1: cut along that dimension. Rp: whole on every rank, its gradient there a part of a sum. once: whole on every
rank, added to y by the first one alone, its gradient whole.

|                              | column | row          |
|------------------------------|--------|--------------|
| weight (N, K)                | S0     | S1           |
| A, B vector                  | S0     | Rp           |
| A_up, B_up                   | S0     | Rp           |
| A_down, B_down               | Rp     | S1           |
| C vector, C_up               | Rp     | S0           |
| C_down                       | Rp     | Rp           |
| D, E vector; bias            | S0     | once         |
| constant A, B                | Rp     | Rp           |
| constant D, E                | Rp     | once         |
| A_up, A_down of the product  | Rp     | (refused)    |

column: x whole, y cut along N. row: x cut along K, y a sum over the ranks. No term of the adapter needs a collective in
forward or backward: each rides in the base layer's own (dx of a column layer, y of a row layer).
"""

from __future__ import annotations

from collections.abc import Mapping

from glora_kernels.spec import GLoRAConfig

COLUMN, ROW = "column", "row"

_OF_ROWS = frozenset(("weight", "bias", "A", "B", "D", "E", "A_up", "B_up"))  # dimension 0 is N
_OF_COLUMNS: Mapping[str, int] = {"weight": 1, "A_down": 1, "B_down": 1, "C": 0, "C_up": 0}  # name → the one that is K
ONCE = frozenset(("bias", "D", "E"))
"""What a row layer's first rank adds to y, before the sum over the ranks."""


def cut_dim(direction: str, name: str, config: GLoRAConfig, transposed: bool = False) -> int | None:
    """The dimension along which a parameter is cut; None where every rank has all of it.

    transposed: the weight is stored as (K, N).
    """
    if name == "weight":
        return int((direction == ROW) is not transposed)
    if name in ("A", "B", "D", "E") and getattr(config, name) == "constant":
        return None
    if name in ("A_up", "A_down") and config.variant == "matmul":
        return None
    if direction == COLUMN:
        return 0 if name in _OF_ROWS else None
    return _OF_COLUMNS.get(name)


def refusal(direction: str, config: GLoRAConfig, shape: tuple[int, int], ranks: int) -> str | None:
    """The reason why a layer (N, K) cannot be cut over so many ranks; None where it can."""
    name, size = ("out_features", shape[0]) if direction == COLUMN else ("in_features", shape[1])
    if size % ranks:
        return f"its {name}, {size}, cannot be cut into {ranks} equal parts, one for each rank of the mesh"
    if direction == ROW and config.variant == "matmul" and config.A == "lora":
        return (
            "A=lora in the product variant, W·A, sums over the columns that the ranks of a row layer hold apart; leave "
            "the layer out of the plan, or take variant='hadamard' or A='none' there"
        )
    return None
