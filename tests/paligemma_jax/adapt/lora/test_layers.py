"""LoRA whose ranks and scales differ from layer to layer, and DoRA: values, gradients, dropout, padding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from paligemma_jax.adapt.lora.adapter import TRAINABLE, attach_lora, install, lora_table, merge_lora
from paligemma_jax.adapt.lora.spec import LoraSpec
from paligemma_jax.adapt.quantization.quantize import quantize
from paligemma_jax.models.dropout import example_dropout, fold_in_name
from paligemma_jax.models.projection import Projection, projections
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
Q = "decoder/layers/self_attn/q_proj"
PATTERN = {r"decoder/layers/0/.*": 3}


def attach(model, targets="decoder/.*/q_proj", rank=5, alpha=4.0, **options):
    return attach_lora(nnx.clone(model), targets, rank, alpha, rngs=nnx.Rngs(0), **options)


def trained_of(model):
    return {path: array for path, array in param_tree.flatten(model).items() if re.fullmatch(TRAINABLE, path)}


def perturbed(model, seed=0):
    """Adds noise to all entries of the adapters that an optimizer can change."""
    key, moved = jax.random.key(seed), {}
    for path, array in trained_of(model).items():
        key, drawn = jax.random.split(key)
        noise = 0.3 * jax.random.normal(drawn, array.shape)
        module = projections(model)[path.rpartition("/")[0]]
        ranks, leaf = module.lora_spec.ranks, path.rpartition("/")[2]
        if len(ranks) > 1 and leaf != "lora_magnitude":
            axis = array.ndim - 1 if leaf == "lora_a" else 1
            used = jnp.arange(array.shape[axis])[None] < jnp.array(ranks)[:, None]
            shape = [len(ranks) if i == 0 else array.shape[i] if i == axis else 1 for i in range(array.ndim)]
            noise = jnp.where(used.reshape(shape), noise, 0.0)
        moved[path] = array + noise
    return param_tree.assign(model, moved)


def loss_of(graph, frozen, batch):
    def loss(trained):
        return jnp.square(param_tree.merge(graph, frozen | trained)(**batch)[0]).mean()

    return jax.jit(jax.value_and_grad(loss))


def split(model):
    graph, arrays = param_tree.split(model)
    trained = {path: array for path, array in arrays.items() if re.fullmatch(TRAINABLE, path)}
    return graph, trained, {path: array for path, array in arrays.items() if path not in trained}


# Ranks and scales of layers.


def test_arrays_are_padded_with_zeros_and_scales_are_the_layers_own(small_model):
    for rslora, scales in ((False, (4 / 3, 7 / 5)), (True, (4 / 3**0.5, 7 / 5**0.5))):
        alphas = {r".*/layers/1/.*": 7}
        module = projections(attach(small_model, rank_pattern=PATTERN, alpha_pattern=alphas, rslora=rslora))[Q]
        assert module.lora_a.shape == (2, 32, 5) and module.lora_b.shape == (2, 5, 4, 8)
        assert not np.any(module.lora_a[...][0, :, 3:]) and np.all(module.lora_a[...][0, :, :3])
        assert np.all(module.lora_a[...][1])
        np.testing.assert_allclose(module.scale, scales, rtol=1e-6)


def test_every_layer_has_its_own_update(small_model, small_batch):
    """Against a plain kernel with s A B added layer by layer in numpy."""
    model = perturbed(attach(small_model, rank_pattern=PATTERN))
    module, expected = projections(model)[Q], nnx.clone(small_model)
    a, b = np.asarray(module.lora_a[...]), np.asarray(module.lora_b[...])
    kernel = np.array(projections(expected)[Q].kernel[...])
    for layer, rank in enumerate((3, 5)):
        kernel[layer] += 4.0 / rank * np.einsum("Dr,rNH->DNH", a[layer, :, :rank], b[layer, :rank])
    projections(expected)[Q].kernel[...] = jnp.asarray(kernel)
    np.testing.assert_allclose(model(**small_batch)[0], expected(**small_batch)[0], rtol=0, atol=1e-5)
    merged = projections(merge_lora(model))[Q]
    np.testing.assert_allclose(merged.kernel[...], kernel, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_padding_and_layers_left_out_never_train(small_model, small_batch, dora):
    model = perturbed(attach(small_model, ".*/q_proj", layers=[1], rank_pattern={"vision/.*": 2}, dora=dora))
    before = small_model(**small_batch)[0]
    assert not np.allclose(model(**small_batch)[0], before, atol=1e-3)
    graph, trained, frozen = split(model)
    start, transform = trained, optax.adamw(0.1, weight_decay=0.1)
    loss_and_gradients, state = loss_of(graph, frozen, small_batch), transform.init(trained)
    for _ in range(2):
        _, gradients = loss_and_gradients(trained)
        for path, gradient in gradients.items():
            assert not np.any(gradient[0]) and np.any(gradient[1]), path
        updates, state = transform.update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
    for path, array in trained.items():
        if not path.endswith("lora_magnitude"):
            assert not np.any(array[0]) and not np.any(start[path][0]), path
    trained = {path: np.where(np.arange(2).reshape(2, *[1] * (a.ndim - 1)) == 1, 0, a) for path, a in trained.items()}
    alone = param_tree.merge(
        graph, frozen | {p: jnp.asarray(a) if "lora_b" in p else start[p] for p, a in trained.items()}
    )
    if not dora:  # the layer that has an adapter switched off: the base
        np.testing.assert_allclose(alone(**small_batch)[0], before, rtol=0, atol=1e-6)


def test_padding_of_a_lower_rank_gets_no_gradient(small_model, small_batch):
    graph, trained, frozen = split(perturbed(attach(small_model, rank_pattern=PATTERN)))
    _, gradients = loss_of(graph, frozen, small_batch)(trained)
    a, b = gradients[f"{Q}/lora_a"], gradients[f"{Q}/lora_b"]
    assert not np.any(a[0, :, 3:]) and not np.any(b[0, 3:])
    assert np.all(np.any(a[0, :, :3], axis=0)) and np.all(np.any(a[1], axis=0)) and np.all(np.any(b[1], axis=(1, 2)))


def test_counts_leave_padding_out(small_model):
    (row,) = lora_table(attach(small_model, rank_pattern=PATTERN, dora=True))
    assert (row.layers, row.lora) == (2, (3 + 5) * (32 + 32) + 2 * 32)
    (row,) = lora_table(attach(small_model, layers=[1]))
    assert (row.layers, row.lora) == (1, 5 * (32 + 32))


def test_options_that_do_not_differ_are_plain_lora(small_model):
    plain, same = (
        attach(small_model),
        attach(small_model, layers=[0, 1], rank_pattern={".*": 5}, alpha_pattern={".*": 4}),
    )
    assert nnx.graphdef(plain) == nnx.graphdef(same)
    assert all(
        np.array_equal(array, param_tree.flatten(same)[path]) for path, array in param_tree.flatten(plain).items()
    )


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"layers": [2]}, r"lora layers are \[2\], expected some of 0 to 1"),
        ({"layers": []}, r"lora layers are \[\], expected some of 0 to 1"),
        ({"rank_pattern": {"decoder/layers/7/.*": 2}}, "lora rank_pattern: 'decoder/layers/7/.*' matches none"),
        ({"alpha_pattern": {"q_proj": 2}}, "lora alpha_pattern: 'q_proj' matches none"),
        ({"rank_pattern": {".*/layers/0/.*": 0}}, "lora has rank 0, expected 1 or more"),
    ],
)
def test_options_that_match_nothing_are_refused(small_model, options, sentence):
    with pytest.raises(UserError, match=sentence):
        attach(small_model, **options)


def test_a_projection_adds_its_scaled_low_rank_update():
    rng = np.random.default_rng(0)
    module = Projection("x", (2, 3), (4,), rngs=nnx.Rngs(0))
    a, b, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 5), (5, 4), (2, 1, 2, 3)))
    install(module, LoraSpec((5,), (2.5,)), a, b, None, 0.0)
    kernel = module.kernel[...] + 0.5 * jnp.einsum("nhr,ro->nho", a, b)
    np.testing.assert_allclose(module(x), jnp.einsum("btnh,nho->bto", x, kernel), rtol=0, atol=1e-5)


# DoRA.


def module_of(kernel, a, b, magnitude, bias, scale=0.7, dropout=0.0):
    module = Projection("q", (3, 4), (5, 2), use_bias=True, rngs=nnx.Rngs(0))
    module.kernel, module.bias = nnx.Param(kernel), nnx.Param(bias)
    spec = LoraSpec((a.shape[-1],), (scale * a.shape[-1],))
    install(module, spec, a, b, magnitude, dropout)
    return module


def dora_arrays():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4, 5, 2), "a": (3, 4, 6), "b": (6, 5, 2), "magnitude": (5, 2), "bias": (5, 2)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def reference(arrays, x, scale=0.7):
    """m / ||V||_row (V x) + bias with V = W + s B A in torch's layout, the norm a constant (golden README)."""
    weight = arrays["kernel"].reshape(12, 10).T + scale * arrays["b"].reshape(6, 10).T @ arrays["a"].reshape(12, 6).T
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(weight**2, axis=1)))
    factor = arrays["magnitude"].reshape(10) / norm
    y = (factor[:, None] * (weight @ x.reshape(-1, 12).T)).T + arrays["bias"].reshape(1, 10)
    return y.reshape(*x.shape[:2], 5, 2)


def test_dora_and_its_gradients_follow_the_definition():
    arrays, x = dora_arrays(), jax.random.normal(jax.random.key(0), (2, 7, 3, 4))
    weights = jax.random.normal(jax.random.key(1), (2, 7, 5, 2))
    np.testing.assert_allclose(module_of(**arrays)(x), reference(arrays, x), rtol=0, atol=1e-5)
    ours = jax.grad(lambda arrays, x: (module_of(**arrays)(x) * weights).sum(), argnums=(0, 1))(arrays, x)
    theirs = jax.grad(lambda arrays, x: (reference(arrays, x) * weights).sum(), argnums=(0, 1))(arrays, x)
    for name in arrays:
        np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_dora_drops_the_adapters_input_and_not_the_bases():
    """As peft: y = W x + b + (g - 1) W drop(x) + g s B A drop(x)."""
    arrays, x = dora_arrays(), jax.random.normal(jax.random.key(0), (2, 7, 3, 4))
    keys = jax.random.split(jax.random.key(2), 2)
    dropped = example_dropout(x, 0.5, fold_in_name(keys, "q"))
    base = jnp.einsum("BTij,ijkl->BTkl", x, arrays["kernel"])
    whole = reference(arrays, dropped) - arrays["bias"][None, None]
    expected = base + arrays["bias"][None, None] + whole - jnp.einsum("BTij,ijkl->BTkl", dropped, arrays["kernel"])
    module = module_of(**arrays, dropout=0.5)
    np.testing.assert_allclose(module(x, keys), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(module(x), reference(arrays, x), rtol=0, atol=1e-5)


def test_fresh_dora_is_the_base_and_its_magnitudes_the_columns_norms(small_model, small_batch):
    model = attach(small_model, ".*", dora=True)
    np.testing.assert_allclose(model(**small_batch)[0], small_model(**small_batch)[0], rtol=0, atol=1e-5)
    for path, module in projections(model).items():
        kernel = np.asarray(module.kernel[...])
        stack = kernel.ndim - len(module.in_shape) - len(module.out_shape)
        flat = kernel.reshape(*kernel.shape[:stack], -1, *module.out_shape)
        np.testing.assert_allclose(
            module.lora_magnitude[...], np.linalg.norm(flat, axis=stack), rtol=1e-5, err_msg=path
        )
        assert module.lora_magnitude.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_on_a_quantised_base_merges_to_what_it_was(small_model, small_batch, kind):
    model = perturbed(attach(quantize(nnx.clone(small_model), kind), "decoder/.*", layers=[1], dora=True))
    graph, arrays = param_tree.split(model)
    before = jax.jit(lambda arrays: param_tree.merge(graph, arrays)(**small_batch)[0])(arrays)
    merged = merge_lora(model)
    np.testing.assert_allclose(merged(**small_batch)[0], before, rtol=0, atol=1e-4)


def test_dora_computes_norms_in_float32_in_half_precision(small_model):
    """bfloat16 squares would be off by percents for a column of equal entries."""
    model = nnx.clone(small_model)
    module = projections(model)["projector/linear"]
    module.kernel, module.dtype = nnx.Param(jnp.full(module.kernel.shape, 0.1, jnp.bfloat16)), "bfloat16"
    attach_lora(model, "projector/linear", dora=True, rngs=nnx.Rngs(0))
    inputs = module.kernel.shape[0]
    expected = np.sqrt(inputs) * float(jnp.bfloat16(0.1))
    np.testing.assert_allclose(module.lora_magnitude[...], expected, rtol=1e-6)


def test_dora_builds_abstractly(small_config):
    from paligemma_jax.models.paligemma import PaliGemma

    def build():
        model = PaliGemma(small_config, rngs=nnx.Rngs(0))
        return attach_lora(model, rank_pattern=PATTERN, dora=True, rngs=nnx.Rngs(1))

    shapes = param_tree.abstract(nnx.eval_shape(build))
    assert shapes[f"{Q}/lora_magnitude"].shape == (2, 4, 8) and shapes[f"{Q}/lora_layer_scale"].shape == (2,)
