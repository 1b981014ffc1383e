"""Within which limits dA of a vector or constant A is recovered from y (`glora.recover`), here and in the kernels."""

SUM = 1.5
"""Of Σₘ p to Σₘ |q|."""
SQUARES = 2.0
"""Of Σₘ p² to Σₘ q²."""
TINY = 2.0**-10
"""Of |1+a|, which q is divided by."""
