"""Fast compilation for tests that compile much and compute little: few optimizations, and a cache of programs.

A plugin (see conftest.py): its fixtures are available to every test.
"""

import contextlib
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiling_fast(folder: str) -> Iterator[None]:
    """Compiles with few optimizations and caches programs in `folder`.

    This applies to subprocesses too, which read the settings from the environment.
    """
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
        try:
            _configure(settings)
            yield
        finally:
            _configure(before)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX checks only once in a process whether there is a cache


@pytest.fixture(scope="session", autouse=True)
def commands_in_this_process_keep_no_programs() -> Iterator[None]:
    """The cache that commands switch on would stay on for the tests after them, and is that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_jax.system.compilation_cache.enable", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory) -> str:
    """The folder of the compiled programs of all tests."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def fast_compilation(compiled_folder) -> Iterator[None]:
    """Fast compilation for the tests of a module."""
    with compiling_fast(compiled_folder):
        yield
