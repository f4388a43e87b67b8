"""Distances between samples, and properties of a flow"s paths."""

from flow_jax.metrics.distances import (
    BLOCK,
    Cloud,
    OtherCloud,
    coverage,
    energy_distance,
    frechet_distance,
    mmd,
    path_energy,
    sinkhorn_divergence,
    straightness,
    wasserstein,
)

__all__ = [
    "BLOCK",
    "Cloud",
    "OtherCloud",
    "coverage",
    "energy_distance",
    "frechet_distance",
    "mmd",
    "path_energy",
    "sinkhorn_divergence",
    "straightness",
    "wasserstein",
]
