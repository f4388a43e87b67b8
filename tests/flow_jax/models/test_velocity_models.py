"""The velocity models: their initial output, dependence on inputs, dropout by rows, sizes of the paper's models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flow_jax as fj
from flow_jax.models import MLP, DiT, DiTConfig, MLPConfig, UNet, UNetConfig, layers

pytestmark = pytest.mark.usefixtures("fast_compilation")
SMALL_UNET = dict(image_size=8, channels=2, width=8, multipliers=(1, 2), num_blocks=1, attention=(4,), head_width=8)
SMALL_DIT = dict(image_size=6, channels=2, patch_size=3, width=16, depth=2, num_heads=2)
MAKERS = {
    "mlp": (MLP, MLPConfig, dict(dim=3, width=16, depth=3, time_width=8), (3,)),
    "unet": (UNet, UNetConfig, SMALL_UNET, (8, 8, 2)),
    "dit": (DiT, DiTConfig, SMALL_DIT, (6, 6, 2)),
}


def make(kind, **changes):
    """A model and a batch of five."""
    model, config, sizes, shape = MAKERS[kind]
    made = model(config(**sizes | changes), rngs=nnx.Rngs(0))
    return made, jax.random.normal(jax.random.key(1), (5, *shape))


def disturb(model):
    """Adds noise to every parameter, so that no branch is zero."""
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(structure, leaves))


@nnx.jit
def call(model, t, x, labels, dropout_keys):
    return model(t, x, labels, dropout_keys)


def run(model, t, x, labels=None, dropout_keys=None):
    return call(model, jnp.asarray(t), x, labels, dropout_keys)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_new_model_is_the_zero_field(kind):
    model, x = make(kind)
    np.testing.assert_array_equal(run(model, 0.3, x), jnp.zeros_like(x))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_depends_only_on_its_own_time_label_and_input(kind):
    model, x = make(kind, num_classes=4)
    model = disturb(model)
    t, labels = jnp.linspace(0.0, 1.0, 5), jnp.array([0, 1, 2, 3, 4])  # 4: no label
    out = run(model, t, x, labels)
    order = jnp.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(run(model, t[order], x[order], labels[order]), out[order], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(run(model, jnp.float32(0.25), x, labels)[1], out[1], rtol=1e-3, atol=1e-4)
    for changed in (
        run(model, t.at[2].add(0.1), x, labels),
        run(model, t, x.at[2].add(0.1), labels),
        run(model, t, x, labels.at[2].set(0)),
    ):
        moved = np.abs(np.asarray(changed - out)).reshape(5, -1).max(axis=1) > 1e-3
        np.testing.assert_array_equal(moved, [False, False, True, False, False])


@pytest.mark.parametrize(
    ("condition", "labels", "other", "null"),
    [
        ({"num_classes": (2, 3)}, [[0, 1], [1, 1]], [[0, 1], [1, 2]], (2, 3)),
        ({"vector_width": 2}, [[0.6, 0.8], [1.0, 0.0]], [[0.6, 0.8], [0.0, 1.0]], 0.0),
    ],
)
def test_attributes_and_vectors_are_conditions_of_single_rows(condition, labels, other, null):
    model, x = make("mlp", **condition)
    model, x = disturb(model), x[:2]
    labels, other = jnp.array(labels), jnp.array(other)
    out, changed = run(model, 0.3, x, labels), run(model, 0.3, x, other)
    np.testing.assert_allclose(changed[0], out[0], rtol=1e-5)
    assert np.abs(changed[1] - out[1]).max() > 1e-3
    keys = jax.random.split(jax.random.key(0), 2)
    dropped = fj.losses.drop_labels(labels, 1.0, null, keys)
    assert dropped.shape == labels.shape and dropped.dtype == labels.dtype
    # Guidance of weight 0 evaluates the model with null labels.
    unconditional = fj.guidance.Guided(model, 0.0, null)(0.3, x, labels)
    np.testing.assert_allclose(unconditional, run(model, 0.3, x, dropped), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fj.losses.drop_labels(labels, 0.0, null, keys), labels)


def test_a_vector_of_zeros_is_the_null_condition():
    model, x = make("mlp", vector_width=2)
    model = disturb(model)
    zeros = run(model, 0.3, x, jnp.zeros((len(x), 2)))
    model.condition.vector.kernel[...] *= 2.0
    np.testing.assert_array_equal(run(model, 0.3, x, jnp.zeros((len(x), 2))), zeros)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_parameter_has_a_gradient(kind):
    model, x = make(kind, num_classes=4)
    graph, state = nnx.split(disturb(model))
    t, labels = jnp.linspace(0.1, 0.9, 5), jnp.arange(5)

    @jax.jit
    def gradient(state):
        return jax.grad(lambda state: (nnx.merge(graph, state)(t, x, labels) ** 2).sum())(state)

    for path, leaf in nnx.to_flat_state(gradient(state)):
        assert float(jnp.abs(leaf[...]).max()) > 1e-6, path


@pytest.mark.parametrize("kind", MAKERS)
def test_dropout_is_a_function_of_a_rows_key_and_off_without_keys(kind):
    model, x = make(kind, dropout=0.5)
    model = disturb(model)
    keys = jax.random.split(jax.random.key(3), 5)
    plain, dropped = run(model, 0.5, x), run(model, 0.5, x, None, keys)
    assert float(jnp.abs(plain - dropped).max()) > 1e-3
    alone = run(model, 0.5, x[3:], None, keys[3:])
    np.testing.assert_allclose(alone, dropped[3:], rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(run(model, 0.5, x[:1].repeat(5, 0), None, keys)[0] - dropped[1]).max()) > 1e-4
    np.testing.assert_array_equal(run(disturb(make(kind)[0]), 0.5, x), plain)


def test_dropout_keeps_the_mean_and_drops_the_share():
    keys = jax.random.split(jax.random.key(0), 100)
    out = layers.drop(jnp.ones((100, 400)), 0.25, keys, "layer")
    assert float((out == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    assert (layers.drop(jnp.ones((100, 400)), 0.25, keys, "other") != out).any()


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_remat_changes_no_value_and_no_gradient(kind):
    changes = dict(multipliers=(1,), attention=(8,)) if kind == "unet" else {}

    def value_and_gradient(remat):
        model, x = make(kind, remat=remat, **changes)
        graph, state = nnx.split(disturb(model))
        loss = jax.jit(jax.value_and_grad(lambda state: (nnx.merge(graph, state)(0.3, x) ** 2).sum()))
        return loss(state)

    a, b = value_and_gradient(False), value_and_gradient(True)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-2), a, b)


def test_dit_joins_patches_where_it_cut_them():
    """A change of one pixel reaches every patch by attention; without blocks' gates it stays in its own."""
    model, x = make("dit")
    quiet = disturb(model)
    quiet.layers.modulation.kernel[...] = jnp.zeros_like(quiet.layers.modulation.kernel[...])
    quiet.layers.modulation.bias[...] = jnp.zeros_like(quiet.layers.modulation.bias[...])
    for each, own_patch_alone in ((quiet, True), (disturb(model), False)):
        moved = np.abs(np.asarray(run(each, 0.5, x.at[0, 1, 4].add(1.0)) - run(each, 0.5, x)))[0].max(-1) > 1e-5
        want = np.zeros((6, 6), bool)
        want[0:3, 3:6] = True
        np.testing.assert_array_equal(moved, want if own_patch_alone else np.ones((6, 6), bool))


def test_dit_positions_differ_and_separate_rows_from_columns():
    positions = np.asarray(fj.models.dit.sincos_positions(5, 16))
    assert len(np.unique(positions.round(5), axis=0)) == 25
    grid = positions.reshape(5, 5, 16)
    np.testing.assert_allclose(grid[2, :, :8], np.tile(grid[2, :1, :8], (5, 1)))  # the row's half along a row
    np.testing.assert_allclose(grid[:, 2, 8:], np.tile(grid[:1, 2, 8:], (5, 1)))


def test_time_features_are_ddpms():
    t = jnp.array([0.0, 0.5])
    got = layers.time_features(t, 8)
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    want = np.concatenate([np.cos(500 * frequencies), np.sin(500 * frequencies)])
    np.testing.assert_allclose(got[1], want, atol=1e-4)
    np.testing.assert_array_equal(got[0], [1, 1, 1, 1, 0, 0, 0, 0])
    assert layers.time_features(t, 7).shape == (2, 7)


def test_attention_equals_jaxs():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 4))
    np.testing.assert_allclose(layers.attend(q, k, v), jax.nn.dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_torchcfms_mlp_is_one_of_these(double):
    """[x, t] through three hidden layers with SELU."""
    model = disturb(MLP(MLPConfig(dim=2, width=8, depth=3, time_width=0, activation="selu"), rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (4, 2), jnp.float32)
    h = jnp.concatenate([x, jnp.full((4, 1), 0.3, jnp.float32)], axis=1)
    for layer in (model.inputs, *model.hidden):
        h = jax.nn.selu(h @ layer.kernel[...] + layer.bias[...][None])
    want = h @ model.outputs.kernel[...] + model.outputs.bias[...][None]
    np.testing.assert_allclose(model(0.3, x), want, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(nnx.state(model))) == 8


def equations(jaxpr):
    """Of a program and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_dtype_is_that_of_every_product(kind):
    """Parameters and the velocity stay in float32; values agree as far as half precision does."""
    model, x = make(kind, num_classes=4)
    model = disturb(model)
    graph = nnx.split(nnx.eval_shape(lambda: make(kind, num_classes=4, dtype="bfloat16")[0]))[0]
    state = nnx.state(model)
    t, labels = jnp.linspace(0.0, 1.0, 5), jnp.array([0, 1, 2, 3, 4])
    out, want = run(nnx.merge(graph, state), t, x, labels), run(model, t, x, labels)
    assert out.dtype == jnp.float32
    assert jnp.abs(out - want).mean() < 0.03 * jnp.abs(want).mean()
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(t, x, labels))(state, x)
    products = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name in ("conv_general_dilated", "dot_general")]
    assert {factor.aval.dtype for eqn in products for factor in eqn.invars} == {jnp.dtype("bfloat16")}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"), [(384, 12, 6, 33), (768, 12, 12, 130), (1152, 28, 16, 675)]
)
def test_dit_has_the_papers_number_of_parameters(width, depth, heads, millions):
    config = DiTConfig(image_size=32, channels=4, width=width, depth=depth, num_heads=heads, num_classes=1000)
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "attentions"),
    [
        ({}, 2 + 3),  # two blocks down and three up at 16
        (dict(num_blocks=3, attention=(16, 8)), 6 + 8),
        (dict(image_size=64, width=192, num_blocks=3, multipliers=(1, 2, 3, 4), attention=(32, 16, 8)), 9 + 12),
    ],
)
def test_unets_of_the_papers_table_have_attention_where_it_says(changes, attentions):
    config = UNetConfig(**changes)
    model = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
    stages = [*model.down, *model.up]
    assert sum(stage.attention is not None for stage in stages) == attentions
    halvings = len(config.multipliers) - 1
    assert sum(stage.block.resize == "down" for stage in stages) == halvings
    assert len(stages) == len(config.multipliers) * (2 * config.num_blocks + 1) + 2 * halvings
    x = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    out = nnx.eval_shape(lambda model, x: model(0.5, x), model, x)
    assert out.shape == x.shape


def test_resizing_keeps_the_mean():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    np.testing.assert_allclose(fj.models.unet.downsample(fj.models.unet.upsample(x)), x, rtol=1e-6)
    np.testing.assert_allclose(fj.models.unet.downsample(x)[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: UNetConfig(image_size=30), "cannot be halved 3 times"),
        (lambda: UNetConfig(attention=(12,)), "feature maps have sides .32, 16, 8, 4."),
        (lambda: DiTConfig(image_size=31), "must divide"),
        (lambda: MLPConfig(depth=0), "depth is 0, expected 1 or more hidden layers"),
        (lambda: MLPConfig(time_width=1), "time_width is 1, expected 2 or more, or 0 without labels"),
        (
            lambda: make("mlp")[0](0.5, jnp.ones((2, 3)), jnp.array([0, 1])),
            "takes nothing for each row, but got one",
        ),
        (
            lambda: make("mlp", num_classes=2)[0](0.5, jnp.ones((2, 3))),
            "takes one label for each row, but got nothing",
        ),
        (lambda: make("mlp", num_classes=2, vector_width=3), "expected one kind"),
        (lambda: make("mlp", vector_width=3, time_width=0), "time_width is 0, expected 2 or more, or 0 without labels"),
        (lambda: make("unet")[0](0.5, jnp.ones((1, 4, 4, 2))), "expected .8, 8, 2."),
        (lambda: make("dit")[0](0.5, jnp.ones((1, 4, 4, 2))), "built for 6 x 6 x 2"),
        (
            lambda: UNetConfig(width=8, head_width=7),
            "cannot be divided into attention heads of 7",
        ),
    ],
)
def test_wrong_sizes_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_selu_is_that_of_jax_to_rounding_and_so_is_its_gradient():
    x = jnp.concatenate([jnp.linspace(-6, 6, 1001), jnp.array([-1e4, -1e-6, 0.0, 1e-6, 1e4])])
    np.testing.assert_allclose(layers.activation("selu")(x), jax.nn.selu(x), rtol=3e-7, atol=3e-7)
    gradients = [jax.vmap(jax.grad(function))(x) for function in (layers.selu, jax.nn.selu)]
    np.testing.assert_allclose(*gradients, rtol=3e-7, atol=3e-7)
    assert layers.activation("silu") is jax.nn.silu
