"""Merging adapters into their bases: the values, what rounding them to 4 bits loses, one layer, whole models."""
