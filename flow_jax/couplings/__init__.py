"""Couplings: the pairing of noise and data in a batch."""

from flow_jax.couplings.pairings import (
    Quality,
    check_pairs,
    conditional,
    exact,
    greedy_permutation,
    host_cost,
    independent,
    over_buffer,
    quality,
    sinkhorn,
    within_class,
)

__all__ = [
    "Quality",
    "check_pairs",
    "conditional",
    "exact",
    "greedy_permutation",
    "host_cost",
    "independent",
    "over_buffer",
    "quality",
    "sinkhorn",
    "within_class",
]
