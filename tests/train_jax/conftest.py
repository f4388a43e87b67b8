"""Settings for the many short runs of one toy task."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from train_jax import loop


@pytest.fixture(scope="session")
def _compiled(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def fast_runs(_compiled):
    """Runs share what they compile, those in processes of their own too, which read these from the environment.

    Compiling takes half the time with few optimizations, and no run draws its curves.
    """
    settings = {
        "jax_compilation_cache_dir": _compiled,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *paths: None)
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX asks once in a process whether there is a cache
        # What earlier tests compiled with all optimizations differs in the last bit from what a new process compiles.
        jax.clear_caches()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
