"""Paths against torchcfm's and flow_matching's numbers, against calculus, and at the ends in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flow_jax as fj
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

TOLERANCE = {"float64": dict(rtol=1e-10, atol=1e-12), "float32": dict(rtol=2e-5, atol=2e-5)}
PATHS = [
    fj.paths.CondOT(),
    fj.paths.CondOT(sigma_min=0.1),
    fj.paths.VP(),
    fj.paths.VE(),
    fj.paths.Cosine(),
    fj.paths.Polynomial(2.0),
    fj.paths.Polynomial(1.5),
    fj.paths.LinearVP(),
]


def schedules(case):
    return {
        "condot": fj.paths.CondOT(),
        "cosine": fj.paths.Cosine(),
        "poly": fj.paths.Polynomial(case["poly_n"]),
        "vp": fj.paths.VP(*map(float, case["vp_betas"])),
        "linearvp": fj.paths.LinearVP(),
    }


def test_schedules_and_samples_equal_flow_matchings(golden_case, precision):
    case = golden_case("flow_paths")
    tolerance = TOLERANCE[precision]
    t = case["sched_t"]
    for name, path in schedules(case).items():
        got = np.stack([path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)])
        want = np.asarray(case[f"fb_{name}_sched"])
        finite = np.isfinite(want)
        assert finite[:2].all()
        np.testing.assert_allclose(got[finite], want[finite], **tolerance, err_msg=name)
        np.testing.assert_allclose(path.signal_to_noise(t[1:-1]), case[f"fb_{name}_snr"], **tolerance)
        s = path.sample(case["x0"], case["x1"], case["t"])
        np.testing.assert_allclose(s.x_t, case[f"fb_{name}_xt"], **tolerance, err_msg=name)
        # The derivative of VP's sigma is steep at the golden's last time, 0.99, which rounds in float32.
        steep = np.asarray(case["t"]) > (0.97 if precision == "float32" and "vp" in name else 1.0)
        np.testing.assert_allclose(s.dx_t[~steep], case[f"fb_{name}_dxt"][~steep], **tolerance, err_msg=name)
        np.testing.assert_allclose(s.dx_t[steep], case[f"fb_{name}_dxt"][steep], rtol=1e-4)


@pytest.mark.parametrize("name", ["icfm", "target", "sb", "vp"])
def test_noisy_paths_equal_torchcfms(golden_case, precision, name):
    case = golden_case("flow_paths")
    tolerance, x_0, x_1, t, noise = TOLERANCE[precision], case["x0"], case["x1"], case["t"], case["eps"]
    sigma = case["sigma"]
    path = {
        "icfm": fj.paths.CFM(sigma),
        "vp": fj.paths.CFM(sigma, base=fj.paths.Cosine()),
        "sb": fj.paths.SchrodingerBridge(case["sigma_sb"]),
        "target": fj.paths.CondOT(case["sigma_min"]),
    }[name]
    if name == "target":  # its noise is the path's own x_0
        s, mean, std = path.sample(noise, x_1, t), path.alpha(t)[:, None] * x_1, path.sigma(t)
    else:
        s, mean, std = path.sample(x_0, x_1, t, noise=noise), path.mean(x_0, x_1, t), path.std(t)
    np.testing.assert_allclose(mean, case[f"cfm_{name}_mu"], **tolerance)
    np.testing.assert_allclose(std, np.asarray(case[f"cfm_{name}_sigma_t"]), **tolerance)
    np.testing.assert_allclose(s.x_t, case[f"cfm_{name}_xt"], **tolerance)
    target = s.dx_t
    if name == "sb":  # torchcfm adds 1e-8 to the denominator of its drift, ours is exact: 2.4e-6 apart at t = 0.01
        width = (2 * t * (1 - t))[:, None]
        target = (x_1 - x_0) + (target - (x_1 - x_0)) * width / (width + 1e-8)
    np.testing.assert_allclose(target, case[f"cfm_{name}_u"], **tolerance)


def test_the_score_weight_is_torchcfms_without_its_epsilon(golden_case, precision):
    case, t = golden_case("flow_paths"), golden_case("flow_paths")["t"]
    for name, path in (("icfm", fj.paths.CFM(case["sigma"])), ("sb", fj.paths.SchrodingerBridge(case["sigma_sb"]))):
        shift = path.sigma**2 / (path.sigma**2 + 1e-8)
        want = np.broadcast_to(np.asarray(case[f"cfm_{name}_lambda"]), t.shape)
        np.testing.assert_allclose(path.score_weight(t) * shift, want, **TOLERANCE[precision])


def test_exactly_coupled_pairs_follow_the_independent_path(golden_case, precision):
    case = golden_case("flow_paths")
    s = fj.paths.CFM(case["sigma"]).sample(case["x0"], case["x1"][case["exactot_perm"]], case["t"], noise=case["eps"])
    np.testing.assert_allclose(s.x_t, case["exactot_xt"], **TOLERANCE[precision])
    np.testing.assert_allclose(s.dx_t, case["exactot_u"], **TOLERANCE[precision])


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_derivatives_equal_those_by_autodiff(double, path):
    t = jnp.linspace(0.05, 0.95, 19)
    for f, df in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        np.testing.assert_allclose(df(t), jax.jvp(f, (t,), (jnp.ones_like(t),))[1], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(path.sigma_d_sigma(t), path.sigma(t) * path.d_sigma(t), rtol=1e-10)
    np.testing.assert_allclose(path.one_minus_alpha(t), 1 - path.alpha(t), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(path.one_minus_sigma(t), 1 - path.sigma(t), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(path.time_at(path.alpha(t), path.sigma(t)), t, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_every_path_leads_from_noise_to_data(path):
    sigma_min = getattr(path, "sigma_min", 0.0)
    alpha_0, sigma_0 = (1.0, path.sigma_max) if isinstance(path, fj.paths.VE) else (0.0, 1.0)
    np.testing.assert_allclose(path.alpha(jnp.array([0.0, 1.0])), [alpha_0, 1.0], atol=0.007)  # VP starts at 0.0066
    np.testing.assert_allclose(path.sigma(jnp.array([0.0, 1.0])), [sigma_0, sigma_min], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_coefficients_keep_their_digits_in_float32_near_both_ends(path):
    near = np.concatenate([10.0 ** -np.arange(1, 7), 1 - 10.0 ** -np.arange(1, 7)]).astype(np.float32)
    functions = ("alpha", "sigma", "one_minus_alpha", "d_alpha", "d_sigma", "sigma_d_sigma", "inverse")
    single = {name: getattr(path, name)(jnp.asarray(near)) for name in functions}
    with jax.enable_x64(True):
        exact = {name: getattr(path, name)(jnp.asarray(near, "float64")) for name in functions}
    for name in functions:
        np.testing.assert_allclose(np.stack(single[name]), np.stack(exact[name]), rtol=5e-6, atol=1e-30, err_msg=name)


def test_vp_without_expm1_would_lose_its_sigma():
    """The trap: sqrt(1 - alpha^2) is zero in float32 where sigma is 1e-3.5."""
    path, t = fj.paths.VP(), jnp.float32(1 - 1e-6)
    assert jnp.sqrt(1 - path.alpha(t) ** 2) != pytest.approx(float(path.sigma(t)), rel=0.05)
    assert float(path.sigma(t)) == pytest.approx(np.sqrt(0.1 * (1 - float(t))), rel=1e-3)


@pytest.mark.parametrize("path", PATHS + [fj.paths.CFM(0.1), fj.paths.SchrodingerBridge()], ids=repr)
def test_targets_are_finite_over_the_path_s_time_range(path):
    low, high = path.time_range
    x = jnp.ones((2, 3))
    s = path.sample(x, 2 * x, jnp.array([low, high]), key=jax.random.key(0))
    assert jnp.isfinite(s.x_t).all() and jnp.isfinite(s.dx_t).all()


def test_a_path_uses_the_noise_it_is_given_and_keeps_image_shapes(double):
    """torchcfm's "target" draws its own noise, so that pairing x_0 has no effect there."""
    x_0, x_1 = jax.random.normal(jax.random.key(1), (2, 3, 4, 5, 2))
    t = jnp.array([0.0, 0.3, 1.0])
    for path in PATHS:
        s = path.sample(x_0, x_1, t, key=jax.random.key(0))
        for row in range(3):
            want = path.alpha(t[row]) * x_1[row] + path.sigma(t[row]) * x_0[row]
            np.testing.assert_allclose(s.x_t[row], want, rtol=1e-12, atol=1e-15)
        assert s.x_t.shape == s.dx_t.shape == (3, 4, 5, 2)
        assert s.x_0 is x_0 and s.x_1 is x_1
    np.testing.assert_array_equal(fj.paths.CondOT().sample(x_0, x_1, 0.25).t, jnp.full(3, 0.25))


def test_noisy_paths_draw_as_they_say():
    x_0, x_1 = jnp.zeros((20_000, 1)), jnp.ones((20_000, 1))
    for path in (fj.paths.CFM(0.3), fj.paths.SchrodingerBridge(0.7)):
        s = path.sample(x_0, x_1, 0.2, key=jax.random.key(0))
        assert float(s.x_t.mean()) == pytest.approx(0.2, abs=0.01)
        assert float(s.x_t.std()) == pytest.approx(float(path.std(0.2)), rel=0.03)
        with pytest.raises(UserError, match="pass `key` or `noise`, one of them .got neither."):
            path.sample(x_0, x_1, 0.2)
        with pytest.raises(UserError, match="got both"):
            path.sample(x_0, x_1, 0.2, key=jax.random.key(0), noise=x_0)
    raw = fj.paths.CFM(0.3).sample(x_0, x_1, 0.2, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(raw.x_t, fj.paths.CFM(0.3).sample(x_0, x_1, 0.2, key=jax.random.key(0)).x_t)
    np.testing.assert_array_equal(fj.paths.CFM(0.0).sample(x_0, x_1, 0.5).x_t, 0.5 * x_1)


def test_a_bridge_of_constant_rate_is_exact_at_tiny_times(double):
    """torchcfm adds 1e-8 to the denominator: at t = 1e-8 its drift is half of what it should be."""
    zero, noise = jnp.zeros((1, 1)), jnp.ones((1, 1))
    s = fj.paths.SchrodingerBridge(1.0).sample(zero, zero, 1e-8, noise=noise)
    np.testing.assert_allclose(s.dx_t, 0.5e4, rtol=1e-7)


@pytest.mark.parametrize("path", PATHS[:6], ids=repr)
def test_a_gaussian_path_of_the_same_moments_is_the_affine_path(double, path):
    """Theorem 3 by jvp equals the closed forms."""
    general = fj.paths.GaussianPath(mu=lambda t, x: path.alpha(t) * x, sigma=lambda t, x: path.sigma(t))
    x_0, x_1, x = jax.random.normal(jax.random.key(1), (3, 7, 2))
    t = jnp.linspace(0.1, 0.9, 7)
    for got, want in zip(general.sample(x_0, x_1, t), path.sample(x_0, x_1, t), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10)
    got, want = general.conditional_velocity(x, x_1, t), path.conditional_velocity(x, x_1, t)
    np.testing.assert_allclose(got, want, rtol=1e-8)


def test_the_flow_of_a_gaussian_path_carries_its_noise(double):
    """A mean that bends and a deviation that differs by coordinate: dx_t is the field at x_t, and d/dt of x_t."""
    path = fj.paths.GaussianPath(
        mu=lambda t, x: jnp.sin(t) * x + t * (1 - t), sigma=lambda t, x: jnp.exp(-t * (1 + x**2))
    )
    x_0, x_1 = jax.random.normal(jax.random.key(1), (2, 5, 2))
    s = path.sample(x_0, x_1, 0.3)
    np.testing.assert_allclose(path.conditional_velocity(s.x_t, x_1, 0.3), s.dx_t, rtol=1e-10)
    slope = (path.sample(x_0, x_1, 0.3 + 1e-6).x_t - path.sample(x_0, x_1, 0.3 - 1e-6).x_t) / 2e-6
    np.testing.assert_allclose(s.dx_t, slope, rtol=1e-7)


def test_a_polynomial_of_infinite_speed_is_refused():
    with pytest.raises(UserError, match="expected n >= 1"):
        fj.paths.Polynomial(0.5)
