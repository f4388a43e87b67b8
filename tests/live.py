"""What is alive on the devices, leftovers of earlier tests aside."""

import gc

import jax


def live_arrays() -> list[jax.Array]:
    """All arrays on devices once unreachable ones are gone: cycles keep those of earlier tests until a collection."""
    gc.collect()
    return jax.live_arrays()
