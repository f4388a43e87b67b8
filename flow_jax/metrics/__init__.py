"""Distances between samples, and properties of a flow's trajectories."""

from flow_jax.metrics.distances import (
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
    "coverage",
    "energy_distance",
    "frechet_distance",
    "mmd",
    "path_energy",
    "sinkhorn_divergence",
    "straightness",
    "wasserstein",
]
