"""Flow matching in JAX: paths, couplings, losses, samplers, likelihoods.

import flow_jax as fj
path = fj.paths.CondOT()
sample = path.sample(x_0, x_1, t)
result = fj.sample(velocity, x_0)
"""

from flow_jax import arrays, assignment, conversions, couplings, marginals, paths, sinkhorn

__all__ = ["arrays", "assignment", "conversions", "couplings", "marginals", "paths", "sinkhorn"]
