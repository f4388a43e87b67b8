"""Flow matching in JAX: paths, couplings, losses, samplers, likelihoods.

import flow_jax as fj
path = fj.paths.CondOT()
sample = path.sample(x_0, x_1, t)
result = fj.sample(velocity, x_0)
"""

from flow_jax import arrays, assignment, conversions, couplings, likelihood, marginals, paths, sinkhorn
from flow_jax.likelihood import bits_per_dim, image_bits_per_dim, log_prob
from flow_jax.sampling import sample

__all__ = [
    "arrays",
    "assignment",
    "bits_per_dim",
    "conversions",
    "couplings",
    "image_bits_per_dim",
    "likelihood",
    "log_prob",
    "marginals",
    "paths",
    "sample",
    "sinkhorn",
]
