"""Merging into a 4-bit base: what rounding to 4 bits again leaves of the adapter, in numbers.

    W_q = Q(W_eff), Q of the base's type, blocks and nesting; W the base as it decodes
    relative error   ‖W_q − W_eff‖ / ‖W_eff‖
    survived         ⟨W_q − W, W_eff − W⟩ / ‖W_eff − W‖²: 1 where all of the change is there on average, 0 where none is
    error of change  ‖(W_q − W) − (W_eff − W)‖ / ‖W_eff − W‖

W lies on the grid already. A change below half a step of it is rounded back to W, whole: a small adapter vanishes,
while the relative error stays small. Norms are Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import without_autocast
from glora_kernels.nn.frozen import describe
from glora_kernels.quant import QuantizedWeight, QuantState, dequantize, quantize_weight
from glora_kernels.reference import effective_bias, effective_weight

if TYPE_CHECKING:
    from glora_kernels.nn.mergeable import Mergeable

_CHUNK = 1 << 18  # weights at a time that are compared in float64
_HEADER = ("layer", "shape", "rel. error", "survived", "error of change", "codes changed", "max error")


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What rounding a merged weight to 4 bits has done to it, or to all 4-bit layers of a model; print it for a table.

    Attributes:
        weights: how many there are.
        weight_norm: ‖W_eff‖.
        change_norm: ‖W_eff − W‖, of what the adapter changes.
        error_norm: ‖W_q − W_eff‖.
        projection: ⟨W_q − W, W_eff − W⟩.
        changed: how many weights have a code of another value than before.
        max_error: the largest |W_q − W_eff|.
        shape: (N, K) of a layer; None for a model.
        layers: of a model, the report of each layer by its path.
    """

    weights: int
    weight_norm: float
    change_norm: float
    error_norm: float
    projection: float
    changed: int
    max_error: float
    shape: tuple[int, int] | None = None
    layers: Mapping[str, MergeReport] = field(default_factory=dict)

    @classmethod
    def of_model(cls, layers: Mapping[str, MergeReport]) -> MergeReport:
        """The figures over all weights of several layers."""
        reports = layers.values()
        return cls(
            weights=sum(report.weights for report in reports),
            weight_norm=math.hypot(*(report.weight_norm for report in reports)),
            change_norm=math.hypot(*(report.change_norm for report in reports)),
            error_norm=math.hypot(*(report.error_norm for report in reports)),
            projection=math.fsum(report.projection for report in reports),
            changed=sum(report.changed for report in reports),
            max_error=max(report.max_error for report in reports),
            layers=dict(layers),
        )

    @property
    def relative_error(self) -> float:
        """‖W_q − W_eff‖ / ‖W_eff‖."""
        if self.weight_norm == 0:
            return 0.0 if self.error_norm == 0 else math.inf
        return self.error_norm / self.weight_norm

    @property
    def survived(self) -> float | None:
        """The share of the adapter's change that is in the rounded weight; None where it changes nothing."""
        return self.projection / self.change_norm**2 if self.change_norm > 0 else None

    @property
    def change_error(self) -> float | None:
        """The error of the change over the change; None where the adapter changes nothing."""
        return self.error_norm / self.change_norm if self.change_norm > 0 else None

    @property
    def codes_changed(self) -> float:
        """The share of the weights that have a code of another value than before."""
        return self.changed / self.weights

    def __repr__(self) -> str:
        rows = [_HEADER, *(report._row(path) for path, report in self.layers.items())]
        count = len(self.layers)
        rows.append(self._row("the layer" if self.shape else f"overall ({count} layer{'s' if count > 1 else ''})"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )

    def _row(self, name: str) -> tuple[str, ...]:
        shape = f"{self.shape[0]}x{self.shape[1]}" if self.shape else ""
        shares = (self.relative_error, self.survived, self.change_error, self.codes_changed)
        return (name, shape, *map(_percent, shares), f"{self.max_error:.2e}")


class Kept(NamedTuple):
    """What `weight`, `bias` and `quant_state` of a layer hold, or held."""

    weight: Tensor
    bias: Tensor | None
    quant_state: QuantState | None = None


def keep(layer: Any) -> Kept:
    """A copy in host memory of what a linear layer holds, dense or in 4 bits."""
    bias, state = layer.bias, getattr(layer, "quant_state", None)
    return Kept(
        layer.weight.detach().to("cpu", copy=True),
        None if bias is None else bias.detach().to("cpu", copy=True),
        None if state is None else state.copied("cpu"),
    )


def write(layer: Any, values: Kept) -> None:
    """Put values into the parameters of a layer, in place; a bias comes and goes as they have one. May be done twice.

    `copy_` tells autograd, so that a backward still to come on the old weight is an error and not a wrong gradient.
    """
    weight, bias, state = values
    layer.weight.copy_(weight)
    if state is not None:
        assert layer.quant_state is not None
        layer.quant_state = layer.quant_state.written(state)
    if bias is None:
        layer.bias = None
    elif layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.device, copy=True), requires_grad=False)
    else:
        layer.bias.copy_(bias)


@torch.no_grad()
def requantized(layer: Mergeable) -> tuple[Kept, MergeReport]:
    """Q(W_eff) and the full bias of a layer that is not merged, and what Q has done; the layer stays as it is.

    W_eff is computed in fp32 from the decoded base and quantized as bitsandbytes would quantize it: in the base's type,
    blocks and nesting. A weight that the adapter does not change keeps its codes and its absmax.

    Raises:
        ValueError: W_eff holds NaN, inf or what is beyond the dtype that the 4-bit weight stands for.
    """
    weight, config = layer.base_weight(), layer.config
    assert isinstance(weight, QuantizedWeight)
    adapter: dict[str, Tensor] = {name: parameter.detach() for name, parameter in layer.adapter().items()}
    dense = dequantize(weight, torch.float32)
    with without_autocast(dense.device.type):
        effective = effective_weight(dense, adapter, config)
        bias = effective_bias(dense, layer.bias, adapter, config)
    codes, report = rounded(weight, dense, effective)
    bias_dtype = layer.base_dtype if layer.bias is None else layer.bias.dtype
    stored = codes.packed.view(layer.weight.shape)
    return Kept(stored, None if bias is None else bias.to(bias_dtype), codes.state), report


def rounded(base: QuantizedWeight, dense: Tensor, effective: Tensor) -> tuple[QuantizedWeight, MergeReport]:
    """Q(W_eff) in the type, blocks and nesting of the base, and what Q has done.

    Args:
        base: W in 4 bits, which is the result where the adapter does not change it.
        dense: W as it decodes, fp32.
        effective: W_eff, fp32.

    Raises:
        ValueError: W_eff holds NaN, inf or what is beyond the dtype that the 4-bit weight stands for.
    """
    state, codes = base.state, base
    if not torch.equal(effective, dense):
        if not effective.abs().amax() <= torch.finfo(state.dtype).max:
            raise ValueError(
                f"the merged weight holds NaN, inf or numbers beyond {state.dtype}, and has no 4-bit codes"
            )
        made = quantize_weight(effective, state.quant_type, state.blocksize, state.nested is not None)
        codes = QuantizedWeight(made.packed, replace(made.state, dtype=state.dtype))
    return codes, _compared(base, codes, effective)


def refusal(layer: Mergeable, report: MergeReport) -> str:
    """Why `merge` does not round to 4 bits unasked, and what to do instead."""
    assert layer.quant_state is not None
    if report.survived is None:
        loss = "this adapter leaves the weight as it is, so that rounding would lose nothing"
    else:
        loss = (
            f"rounding them would leave {_percent(report.survived)} of the adapter's change to this weight, with an "
            f"error of {_percent(report.change_error)} of the change"
        )
    return (
        f"the base is in 4 bits ({describe(layer.quant_state)}), and merged weights no longer lie on its grid: {loss}. "
        "to_linear(dtype) gives a dense merged layer, exact to that dtype; merge(requantize=True) rounds to 4 bits "
        "and reports what is lost"
    )


def check_finite(merged: Kept, base: Kept) -> None:
    """An error where rounding (an overflow of fp16), or an adapter, has left what the base has not.

    Args:
        merged: W_eff (N, K) and the full bias.
        base: W (N, K) and b. In rows where they hold NaN or inf themselves, anything goes.

    Raises:
        ValueError: NaN or inf elsewhere.
    """
    rows = torch.isfinite(base.weight).all(1)
    if base.bias is not None:
        rows = rows & torch.isfinite(base.bias.to(rows.device))
    for name, tensor in (("weight", merged.weight), ("bias", merged.bias)):
        if tensor is None:
            continue
        broken = ~torch.isfinite(tensor) & rows.view(-1, *[1] * (tensor.ndim - 1))
        if bool(broken.any()):
            raise ValueError(
                f"the merged {name} holds NaN, inf or numbers beyond {tensor.dtype} in {int(broken.sum())} places, "
                "and the base does not"
            )


def remerging(layer: Mergeable) -> Callable[[], object]:
    """What merges a merged layer again after `unmerge`; a 4-bit one with the codes that it has now, bit for bit.

    Unless its adapter was changed in between: then it is merged anew, as a dense layer always is. It does nothing to a
    layer that is merged.
    """
    merged = None if layer.quant_state is None else keep(layer)
    versions = _versions(layer)

    def again() -> None:
        if layer.merged:
            return
        if merged is None or _versions(layer) != versions:
            layer.merge(requantize=True)
        else:
            layer.write_merged(merged)

    return again


def copied_weight(layer: Mergeable) -> QuantizedWeight:
    """The 4-bit weight of a layer as it is now, in memory of its own."""
    assert layer.quant_state is not None
    return QuantizedWeight(layer.weight.detach().clone(), layer.quant_state.copied("cpu").to(layer.weight.device))


def _compared(base: QuantizedWeight, rounded: QuantizedWeight, effective: Tensor) -> MergeReport:
    """The figures of the module docstring, summed in float64."""
    n, k = base.shape
    sums = torch.zeros(5, dtype=torch.float64, device=effective.device)
    largest = torch.zeros((), dtype=torch.float64, device=effective.device)
    step = max(1, _CHUNK // k)
    levels = _levels(base), _levels(rounded)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        w, q = (dequantize(weight, torch.float64, rows) for weight in (base, rounded))
        merged = effective[rows].double()
        change, error = merged - w, q - merged
        changed = torch.ne(*(dequantize(weight, torch.float32, rows) for weight in levels)).sum()
        squares = [values.square().sum() for values in (merged, change, error)]
        sums += torch.stack([*squares, ((q - w) * change).sum(), changed.double()])
        largest = torch.maximum(largest, error.abs().amax())
    weight_norm, change_norm, error_norm = sums[:3].sqrt().tolist()
    projection, count = sums[3:].tolist()
    return MergeReport(
        weights=n * k,
        weight_norm=weight_norm,
        change_norm=change_norm,
        error_norm=error_norm,
        projection=projection,
        changed=round(count),
        max_error=largest.item(),
        shape=(n, k),
    )


def _levels(weight: QuantizedWeight) -> QuantizedWeight:
    """The same codes with absmax 1: it decodes to the values of the codes. FP4 has two codes for 0."""
    ones = torch.ones(weight.state.absmax.shape, dtype=torch.float32, device=weight.device)
    return QuantizedWeight(weight.packed, replace(weight.state, absmax=ones, nested=None, dtype=torch.float32))


def _versions(layer: Mergeable) -> list[tuple[int, int]]:
    """Changes with every change of the adapter; tensors of inference mode count none."""
    return [(id(p), 0 if p.is_inference() else p._version) for p in layer.adapter().values()]


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.3g}%" if abs(share) < 9.995 else f"{100 * share:.0f}%"
