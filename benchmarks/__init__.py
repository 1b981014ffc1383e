"""Measurements of the library against the frozen linear layer, the literal formula and PEFT.

Every timing follows a correctness check of the same case in the same run. The package `glora_kernels` never
imports this one. `python -m benchmarks.report` runs everything that this machine, a card or a CPU, can measure.
"""
