"""Settings for the many short runs of one toy task."""

import jax
import pytest

from train_jax import loop


@pytest.fixture(scope="module")
def fast_runs(fast_compilation):
    """Runs share what they compile, those in processes of their own too, and no run draws its curves."""
    # What earlier tests compiled with all optimizations differs in the last bit from what a new process compiles.
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *paths: None)
        yield
