"""A batch whose examples have an adapter each: what tells every layer which one a row of its input has (`gk.rows`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glora_kernels.nn.adapted import Frozen, Operands, expanded, mixed_linear
from glora_kernels.runtime.environment import is_capturing


class Rows(Protocol):
    """What a context tells the layers of a model inside it."""

    inside: str
    """What the layers are in, and what to do about it, for errors."""

    def linear(self, layer: Any, x: Tensor, base: Frozen) -> Tensor:
        """y of a layer over this base."""


class TakesRows:
    """A mixin for layers with several adapters, of which a call can use another one for each row."""

    _rows: Rows | None = None
    """What the context that the layer is in (`gk.rows`, say) tells it; None: the active adapter."""

    @property
    def kept(self) -> dict[str, Any]:
        """What `mixed_linear` keeps from call to call."""
        raise NotImplementedError

    def adapter_names(self) -> Mapping[str, int]:
        """The layer's adapters: a number for each name, by which those of all layers are sorted."""
        raise NotImplementedError

    def operands(self, name: str) -> Operands | str | None:
        """The adapter of this name; None where the layer has none; or the reason why no call takes it."""
        raise NotImplementedError

    def refusal_of_rows(self) -> str | None:
        """The reason why the layer cannot take rows now, or None."""
        raise NotImplementedError

    def refusal_of_call(self, x: Tensor, base: Frozen, adapters: Sequence[Operands]) -> str | None:
        """The reason why it cannot take this x with one of these adapters, or None."""
        return None


def refuse_inside(layers: Iterable[TakesRows], caller: str) -> None:
    """Raise a RuntimeError where layers are inside a context that tells them what to compute."""
    if inside := next((layer._rows for layer in layers if layer._rows is not None), None):
        raise RuntimeError(f"{caller}() was called inside {inside.inside}")


class BatchRows:
    """The adapters of a batch's examples, as the layers of one model are told them.

    Args:
        names: of all adapters of the model.
        index: for each example, or row, the place of its adapter among the names; -1: the base alone.
        present: the names that occur, where that is known: the others get no gradient. None: all get one, of zeros
            where they have no row.
        paths: of the layers, by id.
    """

    called, given, inside = "gk.rows", "names", "rows(model, ...); leave that context first"

    def __init__(
        self, names: tuple[str, ...], index: Tensor, present: Collection[str] | None, paths: Mapping[int, str]
    ) -> None:
        self.names, self.index, self._present, self._paths = names, index, present, paths
        self._kept: dict[object, Tensor] = {}
        self._version = 0  # of the index that they were made of

    def operands(self, layer: Any) -> list[Operands]:
        """The adapters of a layer in the order of the names; one that it does not have is empty.

        Raises:
            RuntimeError: the layer cannot take one of them.
        """
        # In training also without gradients: a checkpoint runs forward twice, and must draw the same dropout masks.
        present = self._present if layer.training or torch.is_grad_enabled() else None
        found = []
        for name in self.names:
            own: Operands | str | None = None
            if present is None or name in present:
                try:
                    own = layer.operands(name)
                except RuntimeError as error:
                    own = str(error)
            if isinstance(own, str):
                if self._present is None or name in self._present:
                    raise RuntimeError(self.refused(layer, f"its adapter {name!r}: {own}"))
                own = None  # no row has it
            found.append(_EMPTY if own is None else own)
        return found

    def linear(self, layer: Any, x: Tensor, base: Frozen) -> Tensor:
        """y of a layer; the errors of `ops.multi_glora_linear`, with the layer in front.

        Raises:
            RuntimeError: the layer cannot take rows, or this call.
        """
        if reason := layer.refusal_of_rows():
            raise RuntimeError(self.refused(layer, reason))
        operands = self.operands(layer)
        if reason := layer.refusal_of_call(x, base, operands):
            raise RuntimeError(self.refused(layer, reason))
        rows = self.of(x, layer)
        try:
            return mixed_linear(x, base, operands, rows, layer.kept)
        except (TypeError, ValueError) as error:
            told = f"{error} (the adapters are {', '.join(map(repr, self.names))}, numbered from 0)"
            raise type(error)(self.refused(layer, told)) from error

    def refused(self, layer: object, reason: str) -> str:
        """The message of an error: a layer and the reason why it takes no rows."""
        return f"{self.called}: {self._paths.get(id(layer), '')!r} cannot be computed: {reason}"

    def of(self, x: Tensor, layer: Any) -> Tensor:
        """The adapter of each row of an x (B, ..., K), of shape (B, ...).

        The same tensor for all layers with inputs of one shape, whose kernels then sort the rows once.

        Raises:
            ValueError: x has another number of examples.
            RuntimeError: a CUDA graph is being captured, which cannot read names or an index on the host.
        """
        index, lead = self.index, x.shape[:-1]
        if lead[: index.ndim] != index.shape:
            raise ValueError(
                f"{self.called}: {self.given} has one entry for each of {tuple(index.shape)} examples, but "
                f"{self._paths.get(id(layer), '')!r} was called with an x of shape {tuple(x.shape)}: a layer must have "
                "the batch in front (for beam search repeat each entry once a beam)"
            )
        compiling = torch.compiler.is_compiling()
        is_ordinary = compiling or not index.is_inference() or torch.is_inference_mode_enabled()  # backward can keep it
        is_there = is_ordinary and index.device == x.device and index.dtype == torch.int64
        if is_there and lead.numel() == index.numel():  # a token of each example, too
            return index.view(lead)
        is_captured = not compiling and is_capturing(x.device)
        if is_captured and index.device != x.device:
            raise RuntimeError(
                f"{self.called}: a CUDA graph is being captured, and {self.given} are on the host, where its replays "
                f"cannot read them; give {self.called} an index tensor on {x.device}, which may be written to between "
                "replays"
            )
        if compiling or is_captured or index.is_inference():
            return _copied(index, lead, x.device)
        if self._version != index._version:
            self._kept.clear()
            self._version = index._version
        found = self._kept.get((lead, x.device))
        if found is None:
            with torch.inference_mode(False):
                found = self._kept[lead, x.device] = _copied(index, lead, x.device)
        return found


def _copied(index: Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    made = expanded(index.to(device, torch.int64), lead)
    return made.clone(memory_format=torch.contiguous_format)  # never an inference tensor that backward refuses


_EMPTY = Operands()
