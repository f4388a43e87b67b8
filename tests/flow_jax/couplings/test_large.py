"""Couplings by ott-jax: the error if it is not installed, and agreement with the other couplings if it is."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import flow_jax as fj
from flow_jax.couplings import large as large_couplings
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
needs_ott = pytest.mark.skipif(
    importlib.util.find_spec("ott") is None, reason="ott-jax, the extra [ot], is not installed"
)


def test_without_ott_the_error_says_what_to_install(monkeypatch):
    for name in ["ott", *(name for name in sys.modules if name.startswith("ott."))]:
        monkeypatch.setitem(sys.modules, name, None)
    x = jnp.ones((4, 2))
    with pytest.raises(UserError, match=r"not installed: pip install 'paligemma-jax\[ot\]'"):
        large_couplings.fit_semidiscrete(x, jax.random.key(0))
    with pytest.raises(UserError, match="needs ott-jax"):
        large_couplings.sharded_sinkhorn(x, x, key=jax.random.key(0))


def test_semidiscrete_pairs_follow_the_potential_and_keep_every_row_of_noise():
    x_0, x_1 = jax.random.normal(jax.random.key(0), (300, 2, 2)), jax.random.normal(jax.random.key(1), (7, 2, 2))
    i, j = large_couplings.semidiscrete_pairs(x_0, x_1, jnp.zeros(7))
    np.testing.assert_array_equal(i, np.arange(300))
    np.testing.assert_array_equal(j, fj.couplings.host_cost(x_0, x_1).argmin(axis=1))
    assert (large_couplings.semidiscrete_pairs(x_0, x_1, jnp.zeros(7).at[3].set(1e3))[1] == 3).all()


def test_drawing_needs_a_key():
    with pytest.raises(UserError, match="pass `key`"):
        large_couplings.sharded_sinkhorn(jnp.ones((4, 2)), jnp.ones((4, 2)))


@needs_ott
def test_a_fitted_potential_uses_every_example_equally_often():
    x_1 = jnp.array([[0.0, 0.0], [3.0, 0.0], [3.5, 0.0], [0.0, 8.0]])
    potential = large_couplings.fit_semidiscrete(x_1, jax.random.key(0), num_steps=1_500)
    x_0 = jax.random.normal(jax.random.key(1), (20_000, 2))
    _, j = large_couplings.semidiscrete_pairs(x_0, x_1, potential)
    np.testing.assert_allclose(np.bincount(j, minlength=4) / 20_000, 0.25, atol=0.03)
    _, nearest = large_couplings.semidiscrete_pairs(x_0, x_1, jnp.zeros(4))
    assert np.bincount(nearest, minlength=4)[3] < 100  # what no potential would do


@needs_ott
@pytest.mark.parametrize("devices", [None, 8])
def test_sharded_sinkhorn_gains_what_ours_gains(devices):
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 64, 2))
    mesh = devices and jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    i, j = large_couplings.sharded_sinkhorn(x_0, x_1, 0.02, jax.random.key(1), mesh=mesh)
    got = fj.couplings.quality(x_0, x_1, i, j).gain_share
    ours = fj.couplings.quality(x_0, x_1, *fj.couplings.sinkhorn(x_0, x_1, 0.02, jax.random.key(1))).gain_share
    assert got > 0.9 and got == pytest.approx(ours, abs=0.05)
