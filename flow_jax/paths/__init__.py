"""Probability paths: one convention for all, t = 0 noise and t = 1 data."""

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
