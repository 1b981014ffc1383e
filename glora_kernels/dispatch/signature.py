"""The arguments of an operator: structures to who writes it, a flat list to PyTorch, a row of tensors in between.

From the structures, NamedTuples whose fields are annotated, follow the schemas of forward and backward and the three
forms that a call has. A field is a tensor, an optional one or a list of them, or a number of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

Row = Sequence[Tensor | None]
"""The tensors of a call in the order of its arguments, lists one after the other."""

_KINDS = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", str: "str", bool: "bool", float: "float",
    Sequence[float]: "float[]", Sequence[int]: "int[]", Sequence[bool]: "bool[]",
}  # fmt: skip
_DEFAULTS = {None: "None", (): "[]"}


class Values(NamedTuple):
    """What of a call is no tensor.

    numbers: in the order of the arguments. sizes: how long each of its lists of tensors is, where it takes lists.
    """

    numbers: tuple[Any, ...]
    sizes: tuple[int, ...] | None = None


def parts(values: Iterable[Any], sizes: Iterable[int]) -> list[list[Any]]:
    """The first of some values as lists of the given sizes."""
    iterator = iter(values)
    return [list(islice(iterator, size)) for size in sizes]


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the values at some places, of which one is a sequence too."""
    first, end = places[0], places[-1] + 1
    return itemgetter(slice(first, end)) if len(places) == end - first else itemgetter(*places)


class Signature:
    """The arguments are the fields of some structures, of which either no tensor is a list or every one.

    Attributes:
        tensors: the names of those that are tensors.
        has_lists: whether these are lists.
    """

    def __init__(self, *structures: type[Any]) -> None:
        self._kinds: dict[str, str] = {}
        self._defaults: list[Any] = []
        for structure in structures:
            hints = get_type_hints(structure)
            self._kinds |= {name: _KINDS[hints[name]] for name in structure._fields}
            known = structure._field_defaults
            # At the end alone: PyTorch takes no argument without a default behind one that has one.
            self._defaults = [*self._defaults, *known.values()] if len(known) == len(structure._fields) else []
        names = list(self._kinds)
        self.tensors = [name for name in names if self._kinds[name].startswith("Tensor")]
        numbers = [name for name in names if name not in self.tensors]
        order = [*self.tensors, *numbers]
        self.has_lists = "Tensor[]" in self._kinds.values()
        # Lists of places, and no `itemgetter`, for what torch.compile traces: a call by PyTorch's arguments.
        self._tensor_places = [names.index(name) for name in self.tensors]
        self._number_places = [names.index(name) for name in numbers]
        self._order = [order.index(name) for name in names]
        self._readers = [(each._make, _getter([order.index(name) for name in each._fields])) for each in structures]
        self._required = len(names) - len(self._defaults)

    def split(self, arguments: Sequence[Any]) -> tuple[list[Any], Values]:
        """The row of a call and its values, from PyTorch's arguments."""
        arguments = self._whole(arguments)
        tensors = [arguments[place] for place in self._tensor_places]
        numbers = [arguments[place] for place in self._number_places]
        values = tuple([tuple(number) if isinstance(number, (list, tuple)) else number for number in numbers])
        if not self.has_lists:
            return tensors, Values(values)
        return [tensor for own in tensors for tensor in own], Values(values, tuple(map(len, tensors)))

    def join(self, row: Sequence[Any], values: Values) -> list[Any]:
        """PyTorch's arguments of a call, from its row (behind which more may stand) and its values."""
        own = row[: len(self.tensors)] if values.sizes is None else parts(row, values.sizes)
        everything = (*own, *values.numbers)
        return [everything[place] for place in self._order]

    def read(self, row: Sequence[Any], values: Values) -> list[Any]:
        """The structures of a call."""
        own = row[: len(self.tensors)] if values.sizes is None else parts(row, values.sizes)
        everything = (*own, *values.numbers)
        return [make(fields_of(everything)) for make, fields_of in self._readers]

    def structures(self, arguments: Sequence[Any]) -> list[Any]:
        """The structures of a call, from PyTorch's arguments."""
        return self.read(*self.split(arguments))

    def _whole(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """PyTorch leaves out the last arguments where they have their default."""
        return (*arguments, *self._defaults[len(arguments) - self._required :])

    def schema(self, optional: bool = False) -> str:
        """As PyTorch wants it declared; `optional`: in a backward, to which an input need not have been kept."""
        kinds = [f"{kind}?" if optional and kind == "Tensor" else kind for kind in self._kinds.values()]
        defaults = [""] * self._required + [f"={_DEFAULTS[default]}" for default in self._defaults]
        declared = zip(kinds, self._kinds, defaults, strict=True)
        return ", ".join(f"{kind} {name}{default}" for kind, name, default in declared)
