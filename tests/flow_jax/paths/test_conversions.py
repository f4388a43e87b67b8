"""Conversions against flow_matching's, against each other, near both ends; the change of schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from tests.flow_jax.paths.test_paths import PATHS, TOLERANCE, schedules

pytestmark = pytest.mark.usefixtures("fast_compilation")

# Rows of the golden's fb_conv arrays.
CONVERSIONS = (
    "x1_to_velocity", "epsilon_to_velocity", "velocity_to_x1", "velocity_to_epsilon", "epsilon_to_x1", "x1_to_epsilon",
)  # fmt: skip


def test_conversions_equal_flow_matchings(golden_case, precision):
    case = golden_case("flow_paths")
    for name, path in schedules(case).items():
        clear = np.asarray(case["t"]) <= (0.97 if precision == "float32" and "vp" in name else 1.0)
        for conversion, want in zip(CONVERSIONS, case[f"fb_conv_{name}"], strict=True):
            got = getattr(path, conversion)(case["model_out"], case["xt_any"], case["t"])
            message = f"{name} {conversion}"
            np.testing.assert_allclose(got[clear], want[clear], **TOLERANCE[precision], err_msg=message)
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4, err_msg=message)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_conversions_recover_the_data_and_noise_of_a_sample(double, path):
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 9, 3, 2))
    t = jnp.linspace(0.05, 0.95, 9)
    s = path.sample(x_0, x_1, t)
    score = -x_0 / path.sigma(t)[:, None, None]
    made = {"x1": x_1, "epsilon": x_0, "velocity": s.dx_t, "score": score}
    for source, value in made.items():
        for target, want in made.items():
            convert = getattr(path, f"{source}_to_{target}", None)
            if convert is not None:
                np.testing.assert_allclose(convert(value, s.x_t, t), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("conversion", ["velocity_to_x1", "velocity_to_epsilon", "velocity_to_score", "x1_to_velocity"])
def test_conversions_keep_their_digits_in_float32_near_both_ends(path, conversion):
    """Of the very float32 inputs, the result errs by roundings of its terms, however small sigma or alpha are."""
    near = np.concatenate([10.0 ** -np.arange(1, 6), 1 - 10.0 ** -np.arange(1, 6)]).astype(np.float32)
    rng = np.random.default_rng(0)
    x_0, x_1 = rng.normal(size=(2, len(near), 3)).astype(np.float32)
    s = path.sample(x_0, x_1, near)
    given = s.x_1 if conversion.startswith("x1") else s.dx_t
    got = getattr(path, conversion)(given, s.x_t, near)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(value), "float64") for value in (given, s.x_t, near)]
        want = np.asarray(getattr(path, conversion)(*wide))
        t = wide[2]
        # What the inputs' own last bit can move the result by is no fault of the conversion: the sum's terms.
        if conversion == "x1_to_velocity":
            sizes = jnp.abs(path.d_sigma(t) / path.sigma(t))[:, None] * (
                jnp.abs(wide[1] - wide[0]) + path.one_minus_alpha(t)[:, None] * jnp.abs(wide[0])
            ) + path.d_alpha(t)[:, None] * jnp.abs(wide[0])
        else:
            c = path.inverse(t)._asdict()
            name = {"x1": "x1", "epsilon": "noise", "score": "score"}[conversion.removeprefix("velocity_to_")]
            sizes = sum(jnp.abs(c[f"{name}_{k}"][:, None] * x) for k, x in (("v", wide[0]), ("x", wide[1])))
    assert (np.abs(np.asarray(got) - want) <= 6e-6 * np.asarray(sizes)).all()


def test_x1_close_to_x_t_leaves_a_bounded_velocity_in_float32():
    """x_1 - x_t over 1 - t: rounding t x_1 first would err by 1e-7 / 1e-6, a tenth."""
    t, path = jnp.float32(1 - 1e-6), fj.paths.CondOT()
    gap = np.float32(1) - np.asarray(t)
    x_1 = jnp.full((1, 1), 1.5, jnp.float32)
    x_t = x_1 - 3 * gap
    want = (float(x_1[0, 0]) - float(x_t[0, 0])) / float(gap)
    np.testing.assert_allclose(path.x1_to_velocity(x_1, x_t, t), want, rtol=1e-6)


@pytest.mark.parametrize("path", [fj.paths.VP(), fj.paths.LinearVP()], ids=repr)
def test_diffusion_paths_give_finite_scores_at_the_very_end(path):
    x, v = jnp.full((2, 3), 0.5), jnp.ones((2, 3))
    for conversion in (path.velocity_to_score, path.velocity_to_x1, path.velocity_to_epsilon):
        assert jnp.isfinite(conversion(v, x, 1.0)).all()
    np.testing.assert_allclose(path.velocity_to_x1(v, x, 1.0), x)


def toy(w):
    return lambda t, x: jnp.sin(w[0] * x) * (1 + fj.arrays.per_row(t, x)) + w[1] * fj.arrays.per_row(t, x) * x


@pytest.mark.parametrize("path", [fj.paths.VP(), fj.paths.LinearVP()], ids=repr)
def test_a_score_gives_its_velocity_where_sigma_vanishes(path):
    """sigma' is infinite at t = 1, sigma sigma' is not."""
    x, score = jnp.array([[0.4, -1.0]]), jnp.array([[2.0, 0.5]])
    at = path.score_to_velocity(score, x, 1.0)
    assert jnp.isfinite(at).all()
    np.testing.assert_allclose(at, path.score_to_velocity(score, x, 1 - 1e-6), rtol=2e-3)


def test_times_of_integer_rows_are_floats():
    assert fj.arrays.as_time(0.5, np.zeros((2, 2), np.int32)) == 0.5


def test_a_change_of_schedule_equals_flow_matchings(golden_case, precision):
    case = golden_case("flow_paths")
    for name in ("cosine", "poly", "vp"):
        changed = fj.conversions.change_schedule(toy(case["toy_w"]), fj.paths.CondOT(), schedules(case)[name])
        got = changed(case["t"], case["xt_any"])
        clear = np.asarray(case["t"]) <= (0.97 if precision == "float32" and name == "vp" else 1.0)
        want = case[f"fb_transform_condot_to_{name}"]
        np.testing.assert_allclose(got[clear], want[clear], **TOLERANCE[precision], err_msg=name)
        np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize(
    ("old", "new"), [(PATHS[0], path) for path in PATHS] + [(path, PATHS[2]) for path in PATHS[1:]], ids=repr
)
def test_a_changed_marginal_field_is_the_other_path_s_field(double, old, new):
    """Both fields belong to the same data, so re-timing one gives the other, wherever both have that ratio."""
    means = jnp.array([[0.5, -1.0], [1.0, 2.0]])
    t = jnp.linspace(0.3, 0.9, 7)
    ratio = new.signal_to_noise(t)
    inside = np.asarray((ratio > old.signal_to_noise(1e-6)) & (ratio < old.signal_to_noise(1 - 1e-6)))
    x = jax.random.normal(jax.random.key(0), (7, 2))
    fields = [fj.marginals.MixtureMarginal(path, means, 0.4).velocity for path in (old, new)]
    changed = fj.conversions.change_schedule(fields[0], old, new)
    assert inside.sum() >= 3
    np.testing.assert_allclose(changed(t, x)[inside], fields[1](t, x)[inside], rtol=1e-7, atol=1e-9)


def test_both_ends_of_a_change_of_schedule_are_finite():
    velocity = fj.marginals.MixtureMarginal(fj.paths.CondOT(), jnp.ones((2, 3)), 0.5).velocity
    x = jnp.full((2, 3), 0.3)
    affine = fj.paths
    for new in (affine.Cosine(), affine.Polynomial(3.0), affine.CondOT(), affine.VP(), affine.LinearVP()):
        changed = fj.conversions.change_schedule(velocity, fj.paths.CondOT(), new)
        assert jnp.isfinite(changed(jnp.array([0.0, 1.0]), x)).all()
    back = fj.conversions.change_schedule(velocity, fj.paths.VP(), fj.paths.CondOT())
    assert jnp.isfinite(back(0.0, x)).all()
