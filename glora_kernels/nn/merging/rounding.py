"""Merging into a 4-bit base: measures of how much of the adapter survives rounding to 4 bits.

    W: the dequantized base;   W_q = Q(W_eff): quantized with the base's type, blocks and nesting
    relative error   ‖W_q − W_eff‖ / ‖W_eff‖
    survived         ⟨W_q − W, W_eff − W⟩ / ‖W_eff − W‖²: 1 if on average the whole change survives, 0 if none does
    error of change  ‖(W_q − W) − (W_eff − W)‖ / ‖W_eff − W‖

W lies on the 4-bit grid already, so a change below half a step is rounded back to W: a small adapter vanishes, although
the relative error is small. Norms are Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glora_kernels.nn.columns import aligned
from glora_kernels.nn.frozen import describe
from glora_kernels.quant import QuantizedWeight, QuantState, dequantize, quantize_weight

_CHUNK = 1 << 18  # weights compared in float64 at a time
_HEADER = ("layer", "shape", "rel. error", "survived", "error of change", "codes changed", "max error")


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The errors of rounding a merged weight, or those of all 4-bit layers of a model, to 4 bits; print it for a table.

    Attributes:
        weights: the number of weights.
        weight_norm: ‖W_eff‖.
        change_norm: ‖W_eff − W‖, the adapter's change.
        error_norm: ‖W_q − W_eff‖.
        projection: ⟨W_q − W, W_eff − W⟩.
        changed: the number of weights whose code has another value than before.
        max_error: the largest |W_q − W_eff|.
        shape: (N, K) of a layer; None for a model.
        layers: for a model, the report of each layer by its path.

    Examples:
        >>> model = gk.quantize(nn.Sequential(nn.Linear(64, 64)), target_modules=["0"])
        >>> model = gk.inject(model, gk.GLoRAConfig(), target_modules=["0"])
        >>> report = gk.merge(model.eval(), requantize=True)
        >>> report.weights
        4096
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
        """The share of the adapter's change that survives rounding; None where the adapter changes nothing."""
        return self.projection / self.change_norm**2 if self.change_norm > 0 else None

    @property
    def change_error(self) -> float | None:
        """The error relative to the adapter's change; None where the adapter changes nothing."""
        return self.error_norm / self.change_norm if self.change_norm > 0 else None

    @property
    def codes_changed(self) -> float:
        """The share of the weights whose code has another value than before."""
        return self.changed / self.weights

    def __repr__(self) -> str:
        rows = [_HEADER, *(report._row(path) for path, report in self.layers.items())]
        count = len(self.layers)
        rows.append(self._row("the layer" if self.shape else f"overall ({count} layer{'s' if count > 1 else ''})"))
        return "\n".join(aligned(rows, "<" + 6 * ">"))

    def _row(self, name: str) -> tuple[str, ...]:
        shape = f"{self.shape[0]}x{self.shape[1]}" if self.shape else ""
        shares = (self.relative_error, self.survived, self.change_error, self.codes_changed)
        return (name, shape, *map(_percent, shares), f"{self.max_error:.2e}")


def rounded(base: QuantizedWeight, dense: Tensor, effective: Tensor) -> tuple[QuantizedWeight, MergeReport]:
    """Quantize W_eff with the type, blocks and nesting of the base; return it with the report.

    Args:
        base: W in 4 bits, which is returned where the adapter does not change it.
        dense: W dequantized, fp32.
        effective: W_eff, fp32.

    Raises:
        ValueError: W_eff holds NaN, inf or numbers beyond the dtype that the base was quantized from.
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


def refusal(state: QuantState, report: MergeReport) -> str:
    """The message that `merge` needs `requantize=True` for a 4-bit base, what that loses, and what to do instead."""
    if report.survived is None:
        loss = "this adapter leaves the weight as it is, so that rounding would lose nothing"
    else:
        loss = (
            f"rounding them would leave {_percent(report.survived)} of the adapter's change to this weight, with an "
            f"error of {_percent(report.change_error)} of the change"
        )
    return (
        f"the base is in 4 bits ({describe(state)}), and merged weights no longer lie on its grid: {loss}. "
        "to_linear(dtype) gives a dense merged layer, exact to that dtype; merge(requantize=True), and "
        "merge_and_unload(requantize=True), round to 4 bits and report what is lost"
    )


def _compared(base: QuantizedWeight, rounded: QuantizedWeight, effective: Tensor) -> MergeReport:
    """The report that compares base, rounded and effective weight, summed in float64."""
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
    weight, change, error = sums[:3].sqrt().tolist()
    projection, count = sums[3:].tolist()
    return MergeReport(n * k, weight, change, error, projection, round(count), largest.item(), (n, k))


def _levels(weight: QuantizedWeight) -> QuantizedWeight:
    """The same codes with absmax 1, which dequantize to the values of the codes: FP4 has two codes for 0."""
    ones = torch.ones(weight.state.absmax.shape, dtype=torch.float32, device=weight.device)
    return QuantizedWeight(weight.packed, replace(weight.state, absmax=ones, nested=None, dtype=torch.float32))


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.3g}%" if abs(share) < 9.995 else f"{100 * share:.0f}%"
