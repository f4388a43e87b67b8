"""MeanFlow against the mean velocity of a known flow; intervals; the pairs of reflow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flow_jax as fj
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
RATE = 1.7


def flow_velocity(t, x):
    """dx/dt = a x: the flow is known at all times."""
    return RATE * x


def mean_velocity(t, x, s):
    """(x_s - x_t) / (s - t) of that flow; its limit where s = t."""
    gap = fj.arrays.per_row(jnp.asarray(s) - jnp.asarray(t), x)
    safe = jnp.where(gap == 0, 1.0, gap)
    return jnp.where(gap == 0, RATE * x, jnp.expm1(RATE * safe) / safe * x)


def test_the_loss_is_zero_for_the_flows_mean_velocity_and_positive_for_others(double):
    """The identity u = v + (s - t) du/dt holds for the flow's own mean velocity, time running from noise to data."""
    x = jax.random.normal(jax.random.key(0), (6, 2))
    t = jnp.linspace(0.0, 0.8, 6)
    end = jnp.minimum(t + jnp.array([0.0, 0.1, 0.2, 0.3, 0.3, 0.2]), 1.0)
    sample = fj.paths.PathSample(x, x, t, x, flow_velocity(t, x))
    np.testing.assert_allclose(fj.few_step.mean_flow(mean_velocity, sample, end), 0, atol=1e-20)
    instantaneous = fj.few_step.mean_flow(lambda t, x, s: flow_velocity(t, x), sample, end)
    assert float(instantaneous[0]) == 0.0  # at s = t the mean velocity is the velocity
    assert (instantaneous[1:] > 1e-3).all()


def test_the_target_has_no_gradient(double):
    """The gradient is that of a regression: through u alone, not through its derivative."""
    x, t = jnp.array([[0.7]]), jnp.array([0.2])
    sample = fj.paths.PathSample(x, x, t, x, flow_velocity(t, x))

    def u(rate):
        return lambda t, x, s: rate * t[:, None] * x

    def loss(rate):
        return fj.few_step.mean_flow(u(rate), sample, jnp.array([0.6]))[0]

    rate = 0.9
    # du/dt = rate x + rate t v; target = v + 0.4 du/dt; loss = (rate t x - target)^2.
    v = RATE * 0.7
    target = v + 0.4 * (rate * 0.7 + rate * 0.2 * v)
    want = 2 * (rate * 0.2 * 0.7 - target) * 0.2 * 0.7
    assert float(jax.grad(loss)(rate)) == pytest.approx(want, rel=1e-10)
    weighted = fj.few_step.mean_flow(u(rate), sample, jnp.array([0.6]), power=1.0)[0]
    assert float(weighted) == pytest.approx(float(loss(rate) / (loss(rate) + 1e-3)), rel=1e-10)


def test_mean_flow_at_equal_times_is_conditional_flow_matching(double):
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 5, 3))
    sample = fj.paths.CondOT().sample(x_0, x_1, jnp.linspace(0.1, 0.9, 5))
    got = fj.few_step.mean_flow(mean_velocity, sample, sample.t)
    np.testing.assert_allclose(got, fj.losses.conditional_flow_matching(flow_velocity, sample), rtol=1e-10)


def test_one_jump_and_many_cross_the_path_exactly():
    x = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    for steps in (1, 4):
        got = fj.few_step.sample_mean_flow(mean_velocity, x, steps)
        np.testing.assert_allclose(got, np.exp(RATE) * x, rtol=1e-5)
    with pytest.raises(UserError, match="num_steps is 0"):
        fj.few_step.sample_mean_flow(mean_velocity, x, 0)


def trained(model, loss, steps):
    """A model after some steps of Adam on loss(model, key)."""
    graph, state = nnx.split(model)
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(carry, key):
        state, moments = carry
        gradient = jax.grad(lambda state: loss(nnx.merge(graph, state), key))(state)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments

    carry = state, optimizer.init(state)
    for number in range(steps):
        carry = step(carry, jax.random.key(number))
    return nnx.merge(graph, carry[0])


def corners(key, n):
    """Noise, and points near (+-2, +-2)."""
    noise, corner, spread = jax.random.split(key, 3)
    signs = jax.random.rademacher(corner, (n, 2), jnp.float32)
    return jax.random.normal(noise, (n, 2)), 2 * signs + 0.2 * jax.random.normal(spread, (n, 2))


def test_a_trained_mean_velocity_samples_in_one_step():
    """One evaluation comes near a corner, where one step of a velocity model would stay in the middle."""

    def loss(model, key):
        pairs, interval = jax.random.split(key)
        t, s = fj.few_step.draw_intervals(interval, 256, fj.times.Uniform(), same=0.5)
        return fj.few_step.mean_flow(model, fj.paths.CondOT().sample(*corners(pairs, 256), t), s).mean()

    mlp = fj.models.MLP(fj.models.MLPConfig(width=64, depth=3, vector_width=16), rngs=nnx.Rngs(0))
    model = trained(fj.few_step.MeanVelocity(mlp, 16), loss, 500)
    result = fj.few_step.sample_mean_flow(model, corners(jax.random.key(9), 500)[0], 1)
    assert float(jnp.abs(jnp.abs(result) - 2).mean()) < 0.7


def test_a_model_trained_on_reflow_pairs_has_straighter_trajectories():
    def loss_on(pairs):
        def loss(model, key):
            rows, times = jax.random.split(key)
            sample = fj.paths.CondOT().sample(*pairs(rows), jax.random.uniform(times, (256,)))
            return fj.losses.conditional_flow_matching(model, sample).mean()

        return loss

    def mlp():
        return fj.models.MLP(fj.models.MLPConfig(width=64, depth=3), rngs=nnx.Rngs(0))

    first = trained(mlp(), loss_on(lambda key: corners(key, 256)), 300)
    x_0 = corners(jax.random.key(8), 2048)[0]
    ends = fj.few_step.reflow_pairs(first, x_0, solver="rk4", num_steps=20)

    def own(key):
        rows = jax.random.randint(key, (256,), 0, len(x_0))
        return ends.x_0[rows], ends.x_1[rows]

    second = trained(mlp(), loss_on(own), 300)
    noise = corners(jax.random.key(9), 200)[0]
    before, after = (fj.metrics.straightness(model, noise) for model in (first, second))
    assert float(after) < 0.3 * float(before)


def test_intervals_are_ordered_and_a_share_has_equal_ends():
    t, s = fj.few_step.draw_intervals(jax.random.key(0), 4000, fj.times.LogitNormal(), same=0.75)
    assert (t <= s).all()
    assert float((t == s).mean()) == pytest.approx(0.75, abs=0.03)
    apart = np.asarray(t != s)
    assert 0.1 < float((s - t)[apart].mean()) < 0.4


def test_reflow_pairs_are_ends_of_the_flow_and_make_it_straight(double):
    """A flow that turns: trained on its own pairs (here in closed form) the next one goes straight."""
    spin = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    x_0 = jax.random.normal(jax.random.key(0), (200, 2))
    pairs = fj.few_step.reflow_pairs(lambda t, x: x @ spin, x_0, rtol=1e-8, atol=1e-8)
    turn = jnp.array([[np.cos(1.0), np.sin(1.0)], [-np.sin(1.0), np.cos(1.0)]])
    np.testing.assert_allclose(pairs.x_1, x_0 @ turn, rtol=1e-5, atol=1e-6)
    sample = fj.paths.CondOT().sample(*pairs, 0.4)
    # The straight lines between these pairs do not cross, so that a linear field fits them without a rest.
    field = jnp.linalg.lstsq(sample.x_t, sample.dx_t)[0]
    np.testing.assert_allclose(sample.x_t @ field, sample.dx_t, atol=1e-5)
