"""Flow matching in JAX: paths, couplings, losses, samplers and likelihoods.

import flow_jax as fj
path = fj.paths.CondOT()
sample = path.sample(x_0, x_1, t)
result = fj.sample(velocity, x_0)
"""

from flow_jax import arrays, couplings, few_step, losses, metrics, models, paths, times
from flow_jax import moved as _moved  # noqa: F401  (old import paths)
from flow_jax.couplings import assignment
from flow_jax.couplings import entropic as sinkhorn
from flow_jax.couplings import large as large_couplings
from flow_jax.ode import guidance, likelihood
from flow_jax.ode.likelihood import bits_per_dim, image_bits_per_dim, log_prob
from flow_jax.ode.sampling import sample
from flow_jax.ode.sde import sample_sde
from flow_jax.paths import conversions, marginals

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
