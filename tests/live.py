"""Live arrays on the devices."""

import gc

import jax


def live_arrays() -> list[jax.Array]:
    """Returns the live arrays after a garbage collection, which frees those in reference cycles of earlier tests."""
    gc.collect()
    return jax.live_arrays()
