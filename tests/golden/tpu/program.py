"""The program of step.hlo: six layers on rows that are split over four chips, and a loss over all rows."""

import jax
import jax.numpy as jnp


def layer(x, kernel):
    return jnp.tanh(x @ kernel)


def loss(x):
    return jnp.square(x.astype(jnp.float32)).sum()


def step(kernels, x):
    """Returns the gradient of `loss` behind a scan of `layer`, for kernels [6, 512, 512] and x [512, 512]."""

    def forward(kernels):
        return loss(jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)[0])

    return jax.grad(forward)(kernels)
