"""Probability paths from noise at t = 0 to data at t = 1."""

from flow_jax.paths.affine import AffinePath, PathSample
from flow_jax.paths.gaussian import CFM, GaussianPath, SchrodingerBridge
from flow_jax.paths.schedules import VE, VP, CondOT, Cosine, LinearVP, Polynomial

__all__ = [
    "CFM",
    "VE",
    "VP",
    "AffinePath",
    "CondOT",
    "Cosine",
    "GaussianPath",
    "LinearVP",
    "PathSample",
    "Polynomial",
    "SchrodingerBridge",
]
