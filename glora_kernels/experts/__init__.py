"""Experts: one product for groups of rows that have a weight each, with a low-rank adapter a group."""

from glora_kernels.experts.linear import Groups, expert_linear

__all__ = ["Groups", "expert_linear"]
