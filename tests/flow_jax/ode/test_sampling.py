"""Samplers against torchdiffeq's and DOP853's solutions, order of convergence, counts of evaluations, bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flow_jax as fj
from flow_jax.ode.integrate import ADAPTIVE, FIXED
from tests.flow_jax.fields import FIELDS
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
GOLDEN_NAMES = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}
FIXED_TOLERANCE = {"float64": 1e-10, "float32": 5e-5}


@pytest.mark.parametrize("name", FIELDS)
def test_fixed_steps_equal_torchdiffeqs(golden_case, precision, name):
    case = golden_case("flow_ode")
    velocity = FIELDS[name](case)
    tolerance = dict(rtol=0, atol=FIXED_TOLERANCE[precision])
    for solver, stored in GOLDEN_NAMES.items():
        for steps in (10, 50):
            r = fj.sample(velocity, case["x0"], solver=solver, num_steps=steps)
            np.testing.assert_allclose(r.x, case[f"{name}_{stored}_{steps}"], **tolerance, err_msg=solver)
            assert int(r.nfe) == steps * len(FIXED[solver].c)
        if solver != "rk4":
            r = fj.sample(velocity, case["x0"], solver=solver, times=case["grid"], trajectory=True)
            np.testing.assert_allclose(r.trajectory, case[f"{name}_{stored}_grid"], **tolerance, err_msg=solver)
            np.testing.assert_array_equal(r.times, case["grid"])
            np.testing.assert_array_equal(r.trajectory[-1], r.x)


@pytest.mark.parametrize(
    ("name", "solver", "per_sample"),
    [("mlp", "dopri5", False), ("gmm", "dopri5", False), ("gmm", "tsit5", True), ("gmm", "dopri8", False)],
)
def test_adaptive_steps_meet_the_exact_solution(golden_case, precision, name, solver, per_sample):
    case = golden_case("flow_ode")
    velocity = FIELDS[name](case)
    for tolerance, allowed, inverse in ((1e-5, 5e-3, 1e-3), (1e-8, 5e-6, 1e-6)):
        if precision == "float32" and tolerance < 1e-5:
            continue
        options = dict(solver=solver, rtol=tolerance, atol=tolerance, per_sample=per_sample)
        r = fj.sample(velocity, case["x0"], **options)
        np.testing.assert_allclose(r.x, case[f"{name}_exact"], rtol=0, atol=allowed)
        back = fj.sample(velocity, case["x1"], t0=1.0, t1=0.0, **options)
        np.testing.assert_allclose(back.x, case[f"{name}_inverse_exact"], rtol=0, atol=inverse)
        assert r.nfe.shape == ((len(case["x0"]),) if per_sample else ())
        if solver == "dopri5":  # step control differs from torchdiffeq's: for orientation
            want = case[f"{name}_dopri5_1em5_nfe" if tolerance == 1e-5 else f"{name}_dopri5_1em8_nfe"]
            assert 0.5 * want < int(r.nfe) < 2 * want


@pytest.mark.parametrize("solver", FIXED)
def test_fixed_solvers_converge_at_their_order(double, solver):
    def velocity(t, x):
        return jnp.sin(3 * t) * x + jnp.cos(x)

    x = jnp.linspace(-1.0, 1.0, 5)[:, None]
    exact = fj.sample(velocity, x, solver="dopri8", rtol=1e-13, atol=1e-13).x
    steps = np.array([20, 40, 80])
    errors = [float(jnp.abs(fj.sample(velocity, x, solver=solver, num_steps=int(n)).x - exact).max()) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(FIXED[solver].order, abs=0.15)


@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
def test_nfe_is_the_number_of_calls(solver):
    calls = []

    def count(t, x):
        calls.append(float(t))
        return np.sin(5 * x) * (1 + t)

    def velocity(t, x):
        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), t, x)

    x = jax.random.normal(jax.random.key(0), (7, 2))
    r = fj.sample(velocity, x, solver=solver, num_steps=6 if solver in FIXED else None)
    jax.block_until_ready(r.x)
    # The choice of a first step may look at the field once or twice, where the compiler does not join these calls.
    assert int(r.nfe) <= len(calls) <= int(r.nfe) + (0 if solver in FIXED else 2)
    assert min(calls) == 0.0 and max(calls) <= 1.0 + 1e-6


def test_a_field_of_constant_rate_is_solved_exactly_in_both_directions():
    x = jnp.ones((3, 2, 2, 1))
    for solver in FIXED:
        r = fj.sample(lambda t, x: 2 * jnp.ones_like(x), x, solver=solver, num_steps=4)
        np.testing.assert_allclose(r.x, 3.0, rtol=1e-6)
        back = fj.sample(lambda t, x: 2 * jnp.ones_like(x), r.x, solver=solver, num_steps=4, t0=1.0, t1=0.0)
        np.testing.assert_allclose(back.x, 1.0, rtol=1e-6)


@pytest.mark.parametrize("solver", FIXED)
def test_steps_divide_the_time_between_any_ends(double, solver):
    """The trap: steps of 1 / num_steps, whatever t0 and t1."""
    r = fj.sample(lambda t, x: 2 * t * jnp.ones_like(x), jnp.zeros((1, 1)), solver, 1000, t0=0.2, t1=0.7)
    np.testing.assert_allclose(r.x, 0.7**2 - 0.2**2, rtol=2e-3 if solver == "euler" else 1e-9)


def stiff(t, x, rate):
    return -rate[:, None] * (x - jnp.cos(20 * t))


def test_rows_with_their_own_steps_are_independent_and_a_shared_step_hides_outliers(double):
    """The trap: the root mean square over many rows hides one row's error; rows of their own steps keep the promise."""
    x, rate = jnp.zeros((256, 1)), jnp.full(256, 0.01).at[0].set(60.0)
    options = dict(solver="dopri5", rtol=1e-4, atol=1e-4)
    exact = fj.sample(stiff, x[:1], solver="dopri8", rtol=1e-12, atol=1e-12, args=(rate[:1],)).x
    shared = fj.sample(stiff, x, args=(rate,), **options)
    own = fj.sample(stiff, x, args=(rate,), per_sample=True, **options)
    alone = fj.sample(stiff, x[:1], args=(rate[:1],), per_sample=True, **options)
    np.testing.assert_allclose(own.x[0], alone.x[0], rtol=1e-12)
    assert abs(float(own.x[0, 0] - exact[0, 0])) < abs(float(shared.x[0, 0] - exact[0, 0]))
    assert int(own.nfe[0]) == int(alone.nfe[0]) > 3 * int(own.nfe[1])


def test_adaptive_trajectories_are_saved_at_the_given_times(double):
    times = [0.0, 0.25, 0.7, 1.0]
    x = jnp.array([[1.0], [2.0]])
    for per_sample in (False, True):
        options = dict(times=times, trajectory=True, rtol=1e-9, atol=1e-9, per_sample=per_sample)
        r = fj.sample(lambda t, x: -3 * x, x, **options)
        want = jnp.exp(-3 * jnp.array(times))[:, None, None] * x[None]
        np.testing.assert_allclose(r.trajectory, want, rtol=1e-6)
        np.testing.assert_allclose(r.x, want[-1], rtol=1e-7)


class Linear(nnx.Module):
    def __init__(self, rate):
        self.rate = nnx.Param(jnp.array(rate))

    def __call__(self, t, x):
        Linear.traces += 1
        return self.rate[...] * x


def test_new_weights_of_a_module_do_not_compile_anew():
    Linear.traces = 0
    x = jnp.ones((2, 1))
    for solver, options in (("tsit5", {}), ("rk4", dict(num_steps=8))):
        first = fj.sample(Linear(1.0), x, solver=solver, **options)
        traced = Linear.traces
        second = fj.sample(Linear(2.0), x, solver=solver, **options)
        assert Linear.traces == traced
        np.testing.assert_allclose(first.x, np.e, rtol=1e-3)
        np.testing.assert_allclose(second.x, np.e**2, rtol=1e-3)
    partial = jax.tree_util.Partial(lambda rate, t, x: rate * x, jnp.array(1.0))
    np.testing.assert_allclose(fj.sample(partial, x).x, np.e, rtol=1e-3)


def test_samples_are_differentiable_in_the_field_s_weights(double):
    def end(rate, solver, steps):
        r = fj.sample(jax.tree_util.Partial(lambda rate, t, x: rate * x, rate), jnp.ones((1, 1)), solver, steps)
        return r.x[0, 0]

    for solver, steps in (("tsit5", None), ("rk4", 20)):
        assert float(jax.grad(end)(jnp.array(1.0), solver, steps)) == pytest.approx(np.e, rel=1e-4)


def test_sampling_works_inside_jit_and_keeps_a_half_precision_state():
    got = jax.jit(lambda x: fj.sample(lambda t, x: x, x).x)(jnp.ones((2, 2)))
    np.testing.assert_allclose(got, np.e, rtol=1e-4)
    x = jnp.ones((2, 2), jnp.bfloat16)
    assert fj.sample(lambda t, x: x.astype(jnp.float32), x, solver="heun", num_steps=4).x.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_steps=10), "leave out num_steps=10"),
        (dict(solver="euler"), "num_steps or times, one of them .got neither."),
        (dict(solver="euler", num_steps=2, times=[0.0, 1.0]), "got both"),
        (dict(solver="euler", num_steps=2, rtol=1e-3), "rtol=0.001 and atol=1e-05 have no effect"),
        (dict(solver="rk4", num_steps=2, per_sample=True), "leave out per_sample"),
        (dict(solver="rk45"), "'rk45' is unknown, expected one of euler"),
        (dict(solver="euler", num_steps=0), "num_steps is 0"),
        (dict(t0=1.0), "nothing to integrate"),
        (dict(solver="euler", times=[0.0, 0.5, 0.5]), "all increasing or all decreasing"),
        (dict(solver="euler", times=[0.0, 0.5], t1=0.5), "leave out t0=0 and t1=0.5"),
        (dict(times=[0.0, 1.0]), "pass trajectory=True and times together"),
        (dict(trajectory=True), "pass trajectory=True and times together"),
        (dict(rtol=0.0, atol=0.0), "give no tolerance"),
    ],
)
def test_contradictory_arguments_are_refused_before_anything_is_computed(options, message):
    def never(t, x):
        raise AssertionError("called")

    with pytest.raises(UserError, match=message):
        fj.sample(never, jnp.ones((2, 2)), **options)


def test_a_solver_that_runs_out_of_steps_fails_loudly():
    def velocity(t, x):
        return jnp.sin(1000 * t) * 1000 * x

    with pytest.raises(RuntimeError, match="within 5 steps"):
        fj.sample(velocity, jnp.ones((1, 1)), max_steps=5)
    assert jnp.isnan(jax.jit(lambda x: fj.sample(velocity, x, max_steps=5).x)(jnp.ones((1, 1)))).all()
