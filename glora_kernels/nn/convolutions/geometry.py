"""What a convolution does besides its weight: the kernel's size, stride, padding and dilation, and products with them.

PyTorch's own convolutions pad an input themselves where the padding is not that of zeros, or "same" and not equal on
both sides, and convolve the padded input. So does a `Geometry`: `padded`, then products without such padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Geometry(NamedTuple):
    """One convolution of groups = 1, for an x (B, channels, *sizes).

    kernel, stride, padding, dilation: a number for each of the sizes. outside: what x is padded with before, as
    `torch.nn.functional.pad` takes it, the last size first; () where only `padding` is needed. mode: of that.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    outside: tuple[int, ...] = ()
    mode: str = "zeros"

    @classmethod
    def of(cls, conv: Any) -> Geometry:
        """That of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
        kernel, dilation = conv.kernel_size, conv.dilation
        if conv.padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            given = (0,) * len(kernel) if conv.padding == "valid" else conv.padding
            sides = [(size, size) for size in given]
        if conv.padding_mode == "zeros" and all(before == after for before, after in sides):
            return cls(kernel, conv.stride, tuple(before for before, _ in sides), dilation)
        outside = tuple(size for side in reversed(sides) for size in side)
        return cls(kernel, conv.stride, (0,) * len(kernel), dilation, outside, conv.padding_mode)

    @property
    def is_pointwise(self) -> bool:
        """Whether each place of y is one place of x times W, so that it is a linear layer over some places of x."""
        return set(self.kernel) == {1} and not any(self.padding) and not any(self.outside)

    @property
    def of_channels(self) -> Geometry:
        """The 1 x 1 convolution over the same sizes."""
        ones = (1,) * len(self.kernel)
        return Geometry(ones, ones, (0,) * len(ones), ones)

    def padded(self, x: Tensor) -> Tensor:
        """x as `product` takes it."""
        if not self.outside:
            return x
        return pad(x, self.outside, mode="constant" if self.mode == "zeros" else self.mode)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of a padded x (B, C, ...) by a weight (N, C, *kernel); the caller has autocast off."""
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, [0] * len(self.kernel), 1
        )

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of a `product` for its x and its weight; None where not wanted."""
        if not any(wanted):
            return None, None
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, self.stride, self.padding, self.dilation, False, [0] * len(self.kernel), 1,
            [*wanted, False],
        )  # fmt: skip
        return dx, dweight
