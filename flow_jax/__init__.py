"""Flow matching in JAX: paths, couplings, losses, samplers, likelihoods.

import flow_jax as fj
path = fj.paths.CondOT()
sample = path.sample(x_0, x_1, t)
result = fj.sample(velocity, x_0)
"""

from flow_jax import (
    arrays,
    assignment,
    conversions,
    couplings,
    few_step,
    guidance,
    large_couplings,
    likelihood,
    losses,
    marginals,
    metrics,
    models,
    paths,
    sinkhorn,
    times,
)
from flow_jax.likelihood import bits_per_dim, image_bits_per_dim, log_prob
from flow_jax.sampling import sample
from flow_jax.sde import sample_sde

__all__ = [
    # Sampling and likelihood
    "bits_per_dim",
    "image_bits_per_dim",
    "log_prob",
    "sample",
    "sample_sde",
    # Submodules
    "arrays",
    "assignment",
    "conversions",
    "couplings",
    "few_step",
    "guidance",
    "large_couplings",
    "likelihood",
    "losses",
    "marginals",
    "metrics",
    "models",
    "paths",
    "sinkhorn",
    "times",
]
