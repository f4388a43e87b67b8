"""The two known velocity fields of the golden flow_ode."""

import jax.numpy as jnp

import flow_jax as fj


def mlp(case):
    """tanh MLP over [x, t]; t is a scalar or one a row."""

    def velocity(t, x):
        h = jnp.concatenate([x, jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])[:, None]], axis=1)
        for layer in range(3):
            h = h @ case[f"mlp_W{layer}"] + case[f"mlp_b{layer}"][None]
            h = jnp.tanh(h) if layer < 2 else h
        return h

    return velocity


def gmm(case):
    """The marginal field of a Gaussian mixture along the conditional-OT path."""
    parts = (case["gmm_means"], case["gmm_stds"], case["gmm_weights"])
    return fj.marginals.MixtureMarginal(fj.paths.CondOT(), *parts).velocity


FIELDS = {"mlp": mlp, "gmm": gmm}
