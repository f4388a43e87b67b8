"""Guidance: its formula, its interval, its cost; the stochastic sampler's marginals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from flow_jax.ode.guidance import Guided
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
NULL = 3


def model(t, x, labels):
    """A constant velocity a label; 10 without one."""
    return jnp.where(labels == NULL, 10.0, labels.astype(x.dtype))[:, None] * jnp.ones_like(x)


def test_guidance_extrapolates_from_no_label_to_the_label():
    x, labels = jnp.zeros((3, 2)), jnp.array([0, 1, 2])
    for weight in (0.0, 1.0, 2.5):
        got = Guided(model, weight, NULL)(0.4, x, labels)
        want = 10.0 + weight * (labels - 10.0)
        np.testing.assert_allclose(got, jnp.broadcast_to(want[:, None], (3, 2)), rtol=1e-6)


def test_guidance_outside_its_interval_is_the_model_itself():
    x, labels = jnp.zeros((3, 2)), jnp.array([0, 1, 2])
    guided = Guided(model, 3.0, NULL, interval=(0.25, 0.5))
    inside, outside = 10.0 + 3.0 * (labels - 10.0), labels.astype(float)
    for t, want in ((0.1, outside), (0.3, inside), (0.6, outside)):
        np.testing.assert_allclose(guided(t, x, labels)[:, 0], want, rtol=1e-6)
    by_rows = guided(jnp.array([0.1, 0.3, 0.6]), x, labels)[:, 0]
    np.testing.assert_allclose(by_rows, [outside[0], inside[1], outside[2]], rtol=1e-6)
    # Over a whole path a quarter of the time is guided.
    r = fj.sample(guided, x, solver="midpoint", num_steps=40, args=(labels,))
    np.testing.assert_allclose(r.x[:, 0], 0.25 * inside + 0.75 * outside, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="interval of guidance is 0.5 to 0.5"):
        Guided(model, 3.0, NULL, interval=(0.5, 0.5))


def test_guidance_outside_its_interval_evaluates_half_the_rows():
    rows = []

    def counting(t, x, labels):
        jax.debug.callback(lambda n: rows.append(int(n)), jnp.array(len(x)))
        return model(t, x, labels)

    guided = jax.jit(Guided(counting, 3.0, NULL, interval=(0.25, 0.5)).__call__)
    for t in (0.1, 0.3):
        jax.block_until_ready(guided(t, jnp.zeros((3, 2)), jnp.array([0, 1, 2])))
    jax.effects_barrier()
    assert rows == [3, 6]


@pytest.mark.parametrize("path", [fj.paths.CondOT(), fj.paths.Cosine(), fj.paths.VP()], ids=repr)
def test_the_stochastic_sampler_keeps_the_marginals(path):
    """With the exact field of a Gaussian mixture, samples have its moments, for any strength."""
    means = jnp.array([[-2.0, 0.0], [2.0, 1.0]])
    velocity = fj.marginals.MixtureMarginal(path, means, 0.3).velocity
    x_0 = jax.random.normal(jax.random.key(0), (4000, 2))
    for strength in (0.5, 2.0):
        r = fj.sample_sde(velocity, x_0, path, jax.random.key(1), num_steps=200, strength=strength)
        x = np.asarray(r.x)
        right = x[:, 0] > 0
        assert right.mean() == pytest.approx(0.5, abs=0.04)
        for side, mean in ((~right, means[0]), (right, means[1])):
            np.testing.assert_allclose(x[side].mean(0), mean, atol=0.05)
            np.testing.assert_allclose(x[side].std(0), 0.3, atol=0.05)
        assert int(r.nfe) == 200


def test_the_stochastic_sampler_is_eulers_method_without_noise_and_forgets_its_start_with_it():
    path = fj.paths.CondOT()
    velocity = fj.marginals.MixtureMarginal(path, jnp.array([[-2.0], [2.0]]), 0.3).velocity
    x_0 = jnp.full((500, 1), 0.2)
    quiet = fj.sample_sde(velocity, x_0, path, jax.random.key(1), num_steps=50, strength=0.0, trajectory=True)
    euler = fj.sample(velocity, x_0, solver="euler", num_steps=50, trajectory=True)
    np.testing.assert_allclose(quiet.trajectory, euler.trajectory, rtol=1e-4, atol=1e-5)
    noisy = fj.sample_sde(velocity, x_0, path, jax.random.key(1), num_steps=100, strength=2.0).x
    assert 0.2 < float((noisy > 0).mean()) < 0.8
    # A row's noise is its own: fewer rows change nothing.
    fewer = fj.sample_sde(velocity, x_0[:3], path, jax.random.key(1), num_steps=100, strength=2.0).x
    np.testing.assert_allclose(fewer, noisy[:3], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="strength >= 0"):
        fj.sample_sde(velocity, x_0, path, jax.random.key(1), strength=-1.0)
    with pytest.raises(UserError, match=r"the path is CFM\(.* expected an affine path"):
        fj.sample_sde(velocity, x_0, fj.paths.CFM(0.1), jax.random.key(1))
