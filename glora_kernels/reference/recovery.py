"""The limits within which dA of a vector or constant A is recovered from y (`glora.recover`; kernels use them too)."""

SUM = 1.5
"""The limit of Σₘ p / Σₘ |q|."""
SQUARES = 2.0
"""The limit of Σₘ p² / Σₘ q²."""
TINY = 2.0**-10
"""The least |1+a|, by which q is divided."""
