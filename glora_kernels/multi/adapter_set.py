"""Adapters laid out for calls of `ops.multi_glora_linear`, once for many of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from glora_kernels.glora.op import Settings
from glora_kernels.multi.adapters import ABSENT, Adapter, Operands

_SETTINGS: dict[str, Any] = {name: value for name, value in Settings()._asdict().items() if name != "columns_before"}
_ACCEPTED = {*Operands._fields, *_SETTINGS}
_KEPT = 8
"""Of how many classes of calls (dtypes of x, bases, backends) a set keeps what it found."""


class Ready(NamedTuple):
    """What calls of one class without gradients need besides x, W and the rows.

    kept: for the path to keep what it finds of these adapters.
    """

    adapters: Sequence[Adapter]
    route: str
    guard: AbstractContextManager[object]
    kept: dict[Any, Any]


class AdapterSet:
    """Adapters that many calls of `multi_glora_linear` take, checked and laid out once.

    A call with a set gives what a call with the list gives. Without gradients, as in decoding, it does not walk through
    the adapters again: it looks only whether their tensors have the addresses, sizes and dtypes that they had. So
    parameters may be trained, loaded, moved or get other `.data`; for other tensors, scales, keys or another number of
    adapters make another set.

    Args:
        adapters: J mappings, as in `multi_glora_linear`. The set holds their tensors, and no copies.

    Raises:
        TypeError: an argument that `glora_linear` has not, an operand that is no tensor, or a stack of adapters, whose
            parts are other tensors in each call. Sizes are checked by the calls.

    Examples:
        >>> from glora_kernels.ops import AdapterSet, multi_glora_linear
        >>> adapters = AdapterSet([{"a": torch.randn(32)}, {"e": torch.randn(32)}])
        >>> multi_glora_linear(torch.randn(2, 16), torch.randn(32, 16), None, adapters, torch.tensor([1, 0])).shape
        torch.Size([2, 32])
    """

    def __init__(self, adapters: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(adapters, Mapping):
            raise TypeError("AdapterSet takes a sequence of mappings, one an adapter; got a mapping (a stack)")
        self.adapters = [dict(adapter) for adapter in adapters]
        for j, adapter in enumerate(self.adapters):
            if unknown := sorted(adapter.keys() - _ACCEPTED):
                raise TypeError(f"adapters[{j}] has {unknown[0]!r}; accepted are {', '.join(sorted(_ACCEPTED))}")
        self.settings = [
            Settings(**{name: own.get(name, default) for name, default in _SETTINGS.items()}) for own in self.adapters
        ]
        operands, places = _layout(self.adapters, self.settings)
        self.tensors = [tensor for own in operands for tensor in own]
        self.lengths = tuple(map(len, operands))
        self.numbers = (
            places,
            tuple([float(s.scale) for s in self.settings]),
            tuple([float(s.dropout_p) for s in self.settings]),
            tuple([s.variant == "matmul" for s in self.settings]),
        )
        self._state: object = None
        self._ready: dict[Hashable, Ready] = {}

    def __len__(self) -> int:
        return len(self.adapters)

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterSet, (self.adapters,)  # a copy has tensors of its own, of which nothing is known

    def with_seeds(self, seeds: Sequence[Tensor]) -> AdapterSet:
        """The same adapters with other keys of dropout: one for each that drops, in their order."""
        keys = iter(seeds)
        drops = [bool(own.dropout_p) for own in self.settings]
        return AdapterSet([
            {**adapter, "seed": next(keys)} if each else adapter
            for adapter, each in zip(self.adapters, drops, strict=True)
        ])  # fmt: skip

    def ready(self, key: Hashable, make: Callable[[], Ready]) -> Ready | None:
        """What the calls of this class need, made anew where a tensor has changed; None where nothing can be kept.

        Args:
            key: all that `make` depends on besides the set's tensors; N and K among it.
            make: checks such a call.
        """
        if not _PLAIN.issuperset(map(type, self.tensors)):
            return None
        state = [list(map(read, self.tensors)) for read in _STATE]
        if state != self._state:
            self._ready.clear()
        found = self._ready.get(key)
        if found is None:
            found = make()
            if len(self._ready) >= _KEPT:
                self._ready.clear()
            self._state, self._ready[key] = state, found
        return found


_PLAIN = {Tensor, nn.Parameter}
_STATE = (Tensor.data_ptr, Tensor.numel, Tensor.stride, attrgetter("dtype"))
"""What of a tensor decides launches: with N and K known, these give its shape, in less time than the shape takes."""


def unstacked(stack: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The adapters of a stack.

    Raises:
        ValueError: tensors, or sequences of numbers, that are not of one number of adapters.
    """
    tensors = {name: t for name, t in stack.items() if isinstance(t, Tensor) and name in Operands._fields}
    counts = {name: len(t) if t.ndim else 0 for name, t in tensors.items()}
    if not counts or len(set(counts.values())) > 1:
        raise ValueError(f"adapters as a stack must be tensors with one number of adapters in front; got {counts}")
    count = next(iter(counts.values()))
    others = {name: _each(name, value, count) for name, value in stack.items() if name not in tensors}
    ranks = others.pop("ranks", None)
    views = {name: t.unbind() for name, t in tensors.items()}
    found: list[Mapping[str, Any]] = []
    for j in range(count):
        own = {name: each[j] for name, each in (*views.items(), *others.items())}
        if ranks is not None:
            own |= {name: own[name][:, : ranks[j]] for name in own if name.endswith("_up")}
            own |= {name: own[name][: ranks[j]] for name in own if name.endswith("_down")}
        found.append(own)
    return found


def _each(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries beside a stack of {count} adapters")
        return list(value)
    return [value] * count


def _layout(
    adapters: Sequence[Mapping[str, Any]], settings: Sequence[Settings]
) -> tuple[list[list[Tensor]], tuple[int, ...]]:
    """The distinct tensors of every field, and the place of each adapter's among them; a seed where it drops."""
    columns: list[list[int]] = []
    found: list[list[Tensor]] = []
    for name in Operands._fields:
        known: list[Tensor] = []
        places: dict[int, int] = {}  # by identity: the adapters hold the tensors meanwhile
        column = []
        for adapter, own in zip(adapters, settings, strict=True):
            tensor = adapter.get(name)
            if tensor is None or (name == "seed" and not (own.dropout_p and adapter.get("b_up") is not None)):
                column.append(ABSENT)
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"adapters[{len(column)}][{name!r}] must be a tensor, got {type(tensor).__name__}")
            place = places.setdefault(id(tensor), len(known))
            if place == len(known):
                known.append(tensor)
            column.append(place)
        found.append(known)
        columns.append(column)
    return found, tuple(place for own in zip(*columns, strict=True) for place in own)
