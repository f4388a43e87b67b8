"""Settings for the many short runs of one toy task."""

import jax
import pytest

from train_jax import loop


@pytest.fixture(scope="module")
def fast_runs(fast_compilation):
    """All runs, also those in subprocesses, share compiled programs, and no run plots curves."""
    # Programs that earlier tests compiled with all optimizations differ in the last bit from those of a new process.
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *paths: None)
        yield
