import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from train_jax.core.errors import UserError
from train_jax.optim.optimizers import make_optimizer, make_schedule

KERNEL, BIAS, SCALE = "decoder/layers/self_attn/q_proj/kernel", "vision/layers/fc1/bias", "decoder/norm/scale"
PARAMS = {KERNEL: jnp.array([[2.0, -1.0]]), BIAS: jnp.array([3.0]), SCALE: jnp.array([0.5])}
GRADS = [
    {KERNEL: jnp.array([[0.3, -0.1]]), BIAS: jnp.array([2.0]), SCALE: jnp.array([-1.0])},
    {KERNEL: jnp.array([[-0.2, 0.4]]), BIAS: jnp.array([1.0]), SCALE: jnp.array([0.0])},
]


def config(**changes):
    return ConfigDict(
        dict(
            name="adamw",
            learning_rate=0.1,
            schedule="constant",
            warmup_constant=None,
            end_factor=0.0,
            rsqrt_timescale=100.0,
            b1=0.9,
            b2=0.99,
            eps=1e-8,
            momentum=0.0,
            min_8bit_size=4096,
            weight_decay=0.0,
            weight_decay_mask=None,
            grad_clip_norm=None,
            rates=(),
        )
        | changes
    )


def train(cfg, grads=GRADS, params=PARAMS, total_steps=10, warmup_steps=0):
    optimizer = make_optimizer(cfg, make_schedule(cfg, total_steps, warmup_steps), params)
    state = optimizer.init(params)
    for gradient in grads:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def adamw_by_hand(param, grads, lr=0.1, b1=0.9, b2=0.99, eps=1e-8, decay=0.0):
    """Loshchilov and Hutter (2019), algorithm 2, in float64."""
    param, m, v = np.asarray(param, np.float64), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        grad = np.asarray(grad, np.float64)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        param = param - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * param)
    return param


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adamw_equals_its_algorithm(decay):
    params, _ = train(config(weight_decay=decay))
    for path in PARAMS:
        expected = adamw_by_hand(PARAMS[path], [g[path] for g in GRADS], decay=decay if path == KERNEL else 0.0)
        np.testing.assert_allclose(params[path], expected, rtol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_weight_decay_is_rate_times_parameter(name):
    for scale in (1.0, 1000.0):
        gradient = jax.tree.map(lambda leaf, scale=scale: scale * leaf, GRADS[0])
        plain, _ = train(config(name=name), [gradient])
        decayed, _ = train(config(name=name, weight_decay=0.2), [gradient])
        np.testing.assert_allclose(decayed[KERNEL] - plain[KERNEL], -0.1 * 0.2 * PARAMS[KERNEL], rtol=1e-3)
        for path in (BIAS, SCALE):
            np.testing.assert_array_equal(decayed[path], plain[path])


def test_default_decay_mask():
    decayed = [
        "decoder/embedder/embedding",
        "decoder/layers/mlp/gate_proj/kernel",
        "decoder/layers/self_attn/q_proj/lora_a",
        "decoder/layers/self_attn/q_proj/lora_b",
        "projector/kernel",
        "vision/patch_embedding/kernel",
        "kernel",
    ]
    kept = ["vision/layers/fc1/bias", "decoder/layers/input_norm/scale", "vision/position_embedding", "logit_scale"]
    params = dict.fromkeys(decayed + kept, jnp.ones(1))
    cfg = config(weight_decay=0.5)
    params, _ = train(cfg, [jax.tree.map(jnp.zeros_like, params)], params)
    assert {path for path, value in params.items() if value[0] < 1.0} == set(decayed)


def test_rates_first_match_wins_and_the_rest_keeps_the_schedule():
    cfg = config(name="sgd", rates=((".*/q_proj/.*", 0.5), ("decoder/.*", 3.0)))
    params, _ = train(cfg, GRADS[:1])
    for path, factor in {KERNEL: 0.5, SCALE: 3.0, BIAS: 1.0}.items():
        np.testing.assert_allclose(params[path], PARAMS[path] - 0.1 * factor * GRADS[0][path], rtol=1e-6)


def test_rates_may_have_their_own_warmup():
    cfg = config(name="sgd", rates=(("vision/.*", 0.5, 4),))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for steps in range(1, 7):
        params, _ = train(cfg, [ones] * steps, warmup_steps=2)
        moved = {path: float((PARAMS[path] - params[path]).ravel()[0]) for path in PARAMS}
        assert moved[KERNEL] == pytest.approx(0.1 * sum(min(t / 2, 1) for t in range(steps)), abs=1e-6)
        assert moved[BIAS] == pytest.approx(0.1 * 0.5 * sum(min(t / 4, 1) for t in range(steps)), abs=1e-6)


def test_clipping_uses_the_global_norm_before_the_moments():
    norm = math.sqrt(0.3**2 + 0.1**2 + 2.0**2 + 1.0)
    clipped, _ = train(config(name="sgd", grad_clip_norm=0.5), GRADS[:1])
    moved = jax.tree.map(lambda old, new: old - new, PARAMS, clipped)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.1 * 0.5, rel=1e-5)
    for path in PARAMS:
        np.testing.assert_allclose(moved[path], 0.1 * GRADS[0][path] * 0.5 / norm, rtol=1e-4)

    unclipped, _ = train(config(name="sgd", grad_clip_norm=10.0), GRADS[:1])
    np.testing.assert_allclose(unclipped[BIAS], PARAMS[BIAS] - 0.1 * 2.0, rtol=1e-6)

    _, state = train(config(grad_clip_norm=0.5), GRADS[:1])
    first_moments = next(leaf for leaf in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(leaf)).mu
    np.testing.assert_allclose(first_moments[BIAS], 0.1 * 2.0 * 0.5 / norm, rtol=1e-5)


def _is_adam(leaf):
    return isinstance(leaf, optax.ScaleByAdamState)


def test_momentum_of_sgd():
    params, _ = train(config(name="sgd", momentum=0.9))
    expected = PARAMS[BIAS] - 0.1 * (2.0 + (0.9 * 2.0 + 1.0))
    np.testing.assert_allclose(params[BIAS], expected, rtol=1e-6)


def test_lion_updates_by_the_sign():
    params, _ = train(config(name="lion"), GRADS[:1])
    np.testing.assert_allclose(params[KERNEL], PARAMS[KERNEL] - 0.1 * np.array([[1.0, -1.0]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"name": "adafactor"}, optax.adafactor(0.1)),
        ({"name": "adafactor", "momentum": 0.9}, optax.adafactor(0.1, momentum=0.9)),
        ({"name": "lion", "weight_decay": 0.2}, optax.lion(0.1, 0.9, 0.99, weight_decay=0.2)),
        ({"name": "sgd", "momentum": 0.9}, optax.sgd(0.1, 0.9)),
        ({"name": "adamw", "weight_decay": 0.2}, optax.adamw(0.1, 0.9, 0.99, weight_decay=0.2)),
    ],
    ids=["adafactor", "adafactor-momentum", "lion", "sgd", "adamw"],
)
def test_equals_the_optax_optimizer(changes, reference):
    path = "decoder/kernel"
    params = expected = {path: jax.random.normal(jax.random.key(0), (128, 256))}
    gradients = [{path: jax.random.normal(jax.random.key(i), (128, 256))} for i in (1, 2)]
    params, state = train(config(**changes), gradients, params)
    reference_state = reference.init(expected)
    for gradient in gradients:
        updates, reference_state = reference.update(gradient, reference_state, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(params[path], expected[path], rtol=1e-5, atol=1e-6)
    if changes == {"name": "adafactor"}:  # factored: no full second moment
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (128 + 256)


def test_adamw_8bit_keeps_large_moments_in_8_bits_and_follows_adamw():
    params = {"decoder/kernel": jnp.ones((64, 80)), "decoder/bias": jnp.ones(80)}
    gradients = [jax.tree.map(lambda leaf, i=i: jnp.cos(jnp.arange(leaf.size) + i).reshape(leaf.shape), params)
                 for i in range(3)]  # fmt: skip
    changes = dict(weight_decay=0.1, rates=((".*/bias", 0.5),))
    result, state = train(config(name="adamw_8bit", **changes), gradients, params)
    expected, _ = train(config(name="adamw", **changes), gradients, params)
    np.testing.assert_allclose(result["decoder/bias"], expected["decoder/bias"], rtol=1e-5)
    assert 0 < jnp.abs(result["decoder/kernel"] - expected["decoder/kernel"]).max() < 0.2 * 0.1

    def codes(state):
        return sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8)

    assert codes(state) == [64 * 80] * 2
    _, state = train(config(name="adamw_8bit", min_8bit_size=80), gradients[:1], params)
    assert codes(state) == [80] * 2 + [64 * 80] * 2


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "lion"])
def test_state_is_float32_for_bfloat16_parameters(name):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    new, state = train(config(name=name, momentum=0.9), GRADS, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {leaf.dtype for leaf in new.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("kind", "changes", "knots"),
    [
        ("constant", {}, {10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {"end_factor": 0.2}, {10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("cosine", {"end_factor": 0.2}, {10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("cosine", {}, {35: 0.5 + 0.5 * math.cos(math.pi / 4), 110: 0.0}),
        ("rsqrt", {"rsqrt_timescale": 50.0}, {10: 1.0, 60: 2**-0.5, 160: 0.5}),
    ],
)
def test_schedule_values_at_knots(kind, changes, knots):
    schedule = make_schedule(config(schedule=kind, learning_rate=4.0, **changes), total_steps=110, warmup_steps=10)
    for step, value in ({0: 0.0, 5: 0.5} | knots).items():
        assert float(schedule(step)) == pytest.approx(4.0 * value, abs=1e-6), step


def test_a_constant_warmup():
    schedule = make_schedule(config(schedule="cosine", learning_rate=4.0, warmup_constant=0.5), 110, 10)
    for step, value in {0: 0.5, 9: 0.5, 10: 4.0, 60: 2.0, 110: 0.0}.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6), step
    assert float(schedule(10, warmup_steps=40)) == 0.5


def test_an_own_warmup_does_not_change_the_decay():
    schedule = make_schedule(config(schedule="linear", learning_rate=1.0), total_steps=100, warmup_steps=0)
    assert float(schedule(0)) == 1.0
    assert float(schedule(10, warmup_steps=40)) == pytest.approx(0.9 * 10 / 40)
    assert float(schedule(50, warmup_steps=40)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "adam", "weight_decay": 0.1}, "no meaning for optimizer 'adam'"),
        ({"weight_decay": 0.1, "weight_decay_mask": ".*/weight"}, "weight_decay_mask .*matches none of 3 paths"),
        ({"rates": (("visoin/.*", 2.0),)}, r"'visoin/\.\*' matches none of 3 paths"),
        ({"rates": (("vision/.*", 0.0),)}, "freeze them by pattern"),
        ({"rates": (("vision/.*", float("inf")),)}, "the factor of 'vision/.*' is inf, expected a finite number"),
        ({"rates": (("vision/.*",),)}, r"expected \(pattern, factor\)"),
    ],
)
def test_optimizer_errors(changes, sentence):
    cfg = config(**changes)
    with pytest.raises(UserError, match=sentence):
        make_optimizer(cfg, make_schedule(cfg, 10, 0), PARAMS)


@pytest.mark.parametrize(
    ("changes", "steps", "sentence"),
    [
        ({"schedule": "rsqrt", "end_factor": 0.1}, (10, 0), "has no meaning for schedule='rsqrt'"),
        ({}, (10, 11), "takes 11 steps, expected 0 to the run's 10"),
    ],
)
def test_schedule_errors(changes, steps, sentence):
    with pytest.raises(UserError, match=sentence):
        make_schedule(config(**changes), *steps)
