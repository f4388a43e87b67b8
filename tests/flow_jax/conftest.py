"""Golden cases of the flow tests, in both precisions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Caches digests of images in a temporary folder instead of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setattr("flow_jax.data.image_datasets.cache_dir", lambda: folder)
        yield


@pytest.fixture
def golden():
    """The folder of golden cases."""
    return GOLDEN


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Runs a test in float32 and in float64."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def double():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


def load_golden(name: str, dtype: str) -> dict:
    """A golden case with its float arrays as JAX arrays of a dtype; scalars as Python numbers."""
    with np.load(GOLDEN / name / "case.npz") as case:
        stored = {key: case[key] for key in case.files}
    return {
        key: value.item() if value.ndim == 0 else jnp.asarray(value, dtype) if value.dtype.kind == "f" else value
        for key, value in stored.items()
    }


@pytest.fixture
def golden_case(precision):
    """Reads a golden case in the precision under test."""
    return lambda name: load_golden(name, precision)
