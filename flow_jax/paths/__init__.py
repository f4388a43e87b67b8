"""Probability paths from noise at t = 0 to data at t = 1."""

from flow_jax.paths.affine import VE, VP, AffinePath, CondOT, Cosine, LinearVP, PathSample, Polynomial
from flow_jax.paths.gaussian import CFM, GaussianPath, SchrodingerBridge

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
