"""Quantised kernels in 4 and 8 bits: NF4, int4, int8."""
