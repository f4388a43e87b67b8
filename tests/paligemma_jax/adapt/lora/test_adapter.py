"""LoRA: parity with peft (loss, five training steps), counts at 3B, invariants of attach and merge."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from paligemma_jax.adapt.lora.adapter import (
    TRAINABLE,
    attach_lora,
    detach_lora,
    format_lora_table,
    lora_table,
    merge_lora,
)
from paligemma_jax.losses import token_cross_entropy
from paligemma_jax.models.paligemma import PaliGemma, variant
from paligemma_jax.models.projection import projections
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.optim.optimizers import Schedule, make_optimizer

pytestmark = pytest.mark.usefixtures("fast_compilation")

PEFT_QO = r".*/(q_proj|o_proj)"  # what peft's ["q_proj", "o_proj"] matches, with the tower's q_proj
SEVEN = "(q|k|v|o|gate|up|down)_proj"
PEFT_KEY = re.compile(
    r"base_model\.model\.model\.(language_model|vision_tower\.encoder)\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight"
)


# Reading peft's files.


def our_path(key):
    """(our parameter path, layer) of one of peft's keys."""
    tower, layer, module, side = PEFT_KEY.fullmatch(key).groups()
    tower = "decoder" if tower == "language_model" else "vision"
    return f"{tower}/layers/{module.replace('.', '/')}/lora_{side.lower()}", int(layer)


def read_adapter(folder, shapes):
    """peft's adapter as our stacked leaves: A (r, in) becomes [L, in..., r], B (out, r) becomes [L, r, out...]."""
    layers = {}
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        path, layer = our_path(key)
        layers.setdefault(path, {})[layer] = weight.T
    stacked = {path: np.stack([arrays[i] for i in range(len(arrays))]) for path, arrays in layers.items()}
    return {path: jnp.asarray(array.reshape(shapes[path].shape)) for path, array in stacked.items()}


def adapted_like_peft(base, folder):
    """The base with the adapter of a peft folder; every adapter array of the file and of the model is accounted for."""
    config = json.loads((folder / "adapter_config.json").read_text())
    targets = config["target_modules"]
    pattern = rf".*/({'|'.join(targets)})" if isinstance(targets, list) else r"decoder/.*/(q_proj|o_proj)"
    model = attach_lora(
        nnx.clone(base),
        pattern,
        config["r"],
        config["lora_alpha"],
        rslora=config["use_rslora"],
        rngs=nnx.Rngs(0),
    )
    shapes = param_tree.abstract(model)
    adapter = read_adapter(folder, shapes)
    assert set(adapter) == {path for path in shapes if re.fullmatch(TRAINABLE, path)}
    return param_tree.assign(model, adapter)


def text_logits(model, inputs):
    graph, arrays = param_tree.split(model)
    return jax.jit(lambda arrays, inputs: param_tree.merge(graph, arrays)(**inputs)[0])(arrays, inputs)


def token_mean(model, case):
    features, _ = model.encode_image(case.inputs["images"])
    text = {name: case.inputs[name] for name in ("tokens", "mask_ar", "mask_input")}
    hidden, _ = model.hidden(features, **text)
    table = model.decoder.embed_tokens.embedding[...]
    return token_cross_entropy(hidden, table, case.targets, case.weights) / case.weights.sum()


# Parity with peft. Tolerances of the golden READMEs.


def test_loss_of_an_active_adapter_equals_peft(golden, hugging_face_model, peft_case):
    model = adapted_like_peft(hugging_face_model, golden / "hf_peft_lora/adapter_qo")
    graph, arrays = param_tree.split(model)
    loss = jax.jit(lambda arrays: token_mean(param_tree.merge(graph, arrays), peft_case))(arrays)
    np.testing.assert_allclose(loss, peft_case.stored["qo_loss"], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def training(golden, hugging_face_model, peft_training_case):
    """Starting adapters, frozen base, and the jitted loss and gradient in the adapters alone."""
    model = adapted_like_peft(hugging_face_model, golden / "hf_lora_training/adapter_init")
    graph, arrays = param_tree.split(model)
    trained = {path: array for path, array in arrays.items() if re.fullmatch(TRAINABLE, path)}
    frozen = {path: array for path, array in arrays.items() if path not in trained}

    @jax.jit
    def loss_and_gradients(trained):
        return jax.value_and_grad(lambda t: token_mean(param_tree.merge(graph, frozen | t), peft_training_case))(
            trained
        )

    return trained, loss_and_gradients


def optimizer(name, rate, paths, **options):
    config = dict(b1=0.9, b2=0.999, eps=1e-8, momentum=0.0, weight_decay=0.0, weight_decay_mask=None)
    config |= dict(name=name, grad_clip_norm=None, rates=()) | options
    return make_optimizer(ConfigDict(config), Schedule(rate, jnp.ones_like, 0), paths)


def train(training, transform):
    """Losses before each of five steps and after the last, the final adapters, and the second step's gradients."""
    trained, loss_and_gradients = training
    state, losses, gradients = transform.init(trained), [], []
    for step in range(6):
        loss, gradient = loss_and_gradients(trained)
        losses.append(float(loss))
        gradients.append(gradient)
        if step < 5:
            updates, state = transform.update(gradient, state, trained)
            trained = optax.apply_updates(trained, updates)
    return losses, trained, gradients


def test_five_steps_of_sgd_equal_peft(golden, training, peft_training_case):
    stored = peft_training_case.stored
    losses, final, gradients = train(training, optimizer("sgd", 0.02, training[0]))
    np.testing.assert_allclose(losses, stored["sgd_loss"], rtol=0, atol=1e-4)
    for path, expected in read_adapter(golden / "hf_lora_training/adapter_final_sgd", final).items():
        np.testing.assert_allclose(final[path], expected, rtol=0, atol=2e-5, err_msg=path)
    for path, gradient in gradients[0].items():
        assert bool(jnp.any(gradient != 0)) == path.endswith("lora_b"), path  # B = 0 hides A from the first gradient
    keys = [name for name in stored if name.startswith("grad2_")]
    assert len(keys) == 4
    for key in keys:
        path, layer = our_path(key.removeprefix("grad2_"))
        expected = stored[key].T.reshape(gradients[1][path][layer].shape)
        np.testing.assert_allclose(gradients[1][path][layer], expected, rtol=0, atol=5e-5, err_msg=key)


def test_five_steps_of_adamw_equal_peft(golden, training, peft_training_case):
    transform = optimizer("adamw", 0.004, training[0], weight_decay=0.01)
    losses, final, _ = train(training, transform)
    np.testing.assert_allclose(losses, peft_training_case.stored["adamw_loss"], rtol=0, atol=1e-4)
    errors = []
    for path, expected in read_adapter(golden / "hf_lora_training/adapter_final_adamw", final).items():
        errors.append(np.abs(np.asarray(final[path]) - expected).ravel())
    assert np.concatenate(errors).max() < 5e-4 and np.median(np.concatenate(errors)) < 1e-5


# Counts.


def attached_shapes(targets):
    def build():
        return attach_lora(PaliGemma(variant("3b-224"), rngs=nnx.Rngs(0)), targets, rngs=nnx.Rngs(1))

    return nnx.eval_shape(build)


@pytest.mark.parametrize(
    "targets, expected", [(r"decoder/.*/(q_proj|o_proj)", 1_179_648), (PEFT_QO, 1_677_312)], ids=["decoder", "as peft"]
)
def test_trained_parameters_of_the_3b_model(targets, expected):
    model = attached_shapes(targets)
    leaves = {path: leaf for path, leaf in param_tree.abstract(model).items() if re.fullmatch(TRAINABLE, path)}
    assert sum(leaf.size for leaf in leaves.values()) == expected
    assert sum(row.lora for row in lora_table(model)) == expected


def test_all_seven_projections_of_the_3b_decoder():
    rows = lora_table(attached_shapes(f"decoder/.*/{SEVEN}"))
    assert len(rows) == 7
    width, heads, head_dim, feed_forward, layers, rank = 2048, 8, 256, 16_384, 18, 8
    pairs = [(width, heads * head_dim), (width, head_dim), (width, head_dim), (heads * head_dim, width)]
    pairs += [(width, feed_forward), (width, feed_forward), (feed_forward, width)]
    assert sum(row.lora for row in rows) == layers * rank * sum(map(sum, pairs))
    assert sum(row.base for row in rows) == layers * sum(math.prod(pair) for pair in pairs)


def test_the_table_shows_counts_per_module_and_totals(small_model):
    model = attach_lora(nnx.clone(small_model), r"decoder/.*/(k_proj|up_proj)", rank=3, rngs=nnx.Rngs(0))
    rows = {row.path: row for row in lora_table(model)}
    k, up = rows["decoder/layers/self_attn/k_proj"], rows["decoder/layers/mlp/up_proj"]
    assert (k.layers, k.d_in, k.d_out, k.base, k.lora) == (2, 32, 16, 1024, 2 * 3 * 48)
    assert (up.layers, up.d_in, up.d_out, up.base, up.lora) == (2, 32, 48, 3072, 2 * 3 * 80)
    lines = format_lora_table(lora_table(model)).splitlines()
    assert lines[0].split() == ["LoRA", "on", "layers", "d_in", "d_out", "base", "LoRA", "share"]
    assert lines[1].split() == ["decoder/layers/mlp/up_proj", "2", "32", "48", "3,072", "480", "15.62%"]
    assert lines[2].split() == ["decoder/layers/self_attn/k_proj", "2", "32", "16", "1,024", "288", "28.12%"]
    assert lines[3].split() == ["total", "4,096", "768", "18.75%"]
    assert len({len(line) for line in lines}) == 1


# Invariants.


def randomised(model, seed=0):
    """Sets B to random values, so that the adapters change the output."""
    arrays = param_tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed), len(arrays))
    drawn = {
        path: 0.1 * jax.random.normal(key, arrays[path].shape)
        for key, path in zip(keys, sorted(arrays), strict=True)
        if re.fullmatch(r".*/lora_b", path)
    }
    return param_tree.assign(model, drawn)


@pytest.fixture(scope="module")
def attached(small_model):
    """Adapters on every projection of both towers; read-only."""
    return attach_lora(nnx.clone(small_model), ".*", rank=4, alpha=8.0, dropout=0.5, rngs=nnx.Rngs(1))


def test_a_fresh_adapter_changes_nothing(small_model, attached, small_batch):
    assert len(projections(attached)) == 15  # patches, 6 of the tower, projector, 7 of the decoder
    np.testing.assert_array_equal(text_logits(attached, small_batch), text_logits(small_model, small_batch))


def test_merged_equals_unmerged(attached, small_batch):
    model = randomised(attached)
    unmerged = text_logits(model, small_batch)
    merged = merge_lora(nnx.clone(model))
    assert not any(re.fullmatch(TRAINABLE, path) for path in param_tree.flatten(merged))
    np.testing.assert_allclose(text_logits(merged, small_batch), unmerged, rtol=0, atol=1e-5)
    assert float(jnp.abs(unmerged - text_logits(attached, small_batch)).max()) > 0.1


def test_delta_is_scale_times_a_times_b(attached):
    module = projections(randomised(attached))["decoder/layers/self_attn/o_proj"]
    a, b = module.lora_a[...], module.lora_b[...]
    expected = 2.0 * np.einsum("LNHr,LrD->LNHD", a, b)  # alpha / rank = 8 / 4
    np.testing.assert_allclose(module.low_rank_delta(), expected, rtol=1e-5, atol=1e-7)


def test_merging_keeps_the_kernels_dtype(small_model):
    model = nnx.clone(small_model)
    kernel = projections(model)["projector/linear"].kernel
    projections(model)["projector/linear"].kernel = nnx.Param(kernel[...].astype(jnp.bfloat16))
    model = randomised(attach_lora(model, "projector/linear", rngs=nnx.Rngs(0)))
    module = projections(model)["projector/linear"]
    expected = (module.kernel[...].astype(jnp.float32) + module.low_rank_delta()).astype(jnp.bfloat16)
    np.testing.assert_array_equal(projections(merge_lora(model))["projector/linear"].kernel[...], expected, strict=True)


def test_detaching_gives_back_the_base(small_model, attached):
    base, back = param_tree.flatten(small_model), param_tree.flatten(detach_lora(nnx.clone(attached)))
    assert set(back) == set(base)
    assert all(np.array_equal(back[path], base[path]) for path in base)
    assert nnx.graphdef(detach_lora(nnx.clone(attached))) == nnx.graphdef(small_model)


def test_base_names_and_values_survive_attaching(small_model, attached):
    base, arrays = param_tree.flatten(small_model), param_tree.flatten(attached)
    added = set(arrays) - set(base)
    assert all(re.fullmatch(TRAINABLE, path) for path in added) and len(added) == 2 * 15
    assert all(np.array_equal(arrays[path], base[path]) for path in base)


def test_a_is_kaiming_uniform_over_all_contracted_axes_and_b_zero(small_model):
    model = attach_lora(nnx.clone(small_model), ".*", rank=64, rngs=nnx.Rngs(2))
    for path, module in projections(model).items():
        bound = 1.0 / math.sqrt(math.prod(module.in_shape))
        a = np.abs(np.asarray(module.lora_a[...]))
        assert 0.98 * bound < a.max() <= bound, path
        np.testing.assert_allclose(a.mean(), bound / 2, rtol=0.1, err_msg=path)
        assert not np.any(module.lora_b[...]), path
    out = projections(model)["decoder/layers/self_attn/o_proj"]
    assert out.in_shape == (4, 8) and out.lora_a.shape == (2, 4, 8, 64) and out.lora_b.shape == (2, 64, 32)


def test_layers_of_a_stack_start_from_different_a(attached):
    a = projections(attached)["decoder/layers/self_attn/q_proj"].lora_a[...]
    assert not np.array_equal(a[0], a[1])


def test_only_adapters_have_a_gradient_and_the_base_stays_bit_identical(training, hugging_face_model):
    trained, loss_and_gradients = training
    before = {path: np.array(array) for path, array in param_tree.flatten(hugging_face_model).items()}
    _, gradients = loss_and_gradients(trained)
    assert set(gradients) == set(trained) and not set(gradients) & set(before)
    train(training, optimizer("adamw", 0.004, trained))
    after = param_tree.flatten(hugging_face_model)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_rslora_divides_by_the_root_of_the_rank(small_model):
    for rslora, scale in ((False, 32.0 / 16), (True, 32.0 / 4)):
        model = attach_lora(nnx.clone(small_model), "projector/linear", rank=16, rslora=rslora, rngs=nnx.Rngs(0))
        assert model.projector.linear.lora_scale == scale


# Dropout.


def test_dropout_needs_keys_is_reproducible_and_averages_to_the_deterministic_output(attached):
    module = randomised(attached).projector.linear
    x = jax.random.normal(jax.random.key(0), (4096, 1, 16))
    plain = module(x)
    keys = jax.random.split(jax.random.key(1), 4096)
    dropped = module(x, keys)
    np.testing.assert_array_equal(module(x, keys), dropped)
    assert not np.allclose(dropped, plain, atol=1e-3)
    assert not np.array_equal(module(x, jax.random.split(jax.random.key(2), 4096)), dropped)
    error = np.asarray(dropped - plain)
    assert np.all(np.abs(error.mean(0)) < 5 * error.std(0) / math.sqrt(4096))


def test_dropout_without_a_rate_is_off(small_model):
    model = randomised(attach_lora(nnx.clone(small_model), "projector/linear", rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    keys = jax.random.split(jax.random.key(1), 2)
    np.testing.assert_array_equal(model.projector.linear(x, keys), model.projector.linear(x))


def test_layers_and_modules_drop_different_entries(attached, small_batch):
    """Equal masks in all layers would drop the same features everywhere; they come from layer number and name."""
    graph, arrays = param_tree.split(randomised(attached))
    keys = jax.random.split(jax.random.key(0), 3)
    forward = jax.jit(lambda keys: param_tree.merge(graph, arrays)(**small_batch, dropout_keys=keys)[0])
    one = forward(keys)
    np.testing.assert_array_equal(one, forward(keys))
    swapped = forward(keys[::-1])
    np.testing.assert_array_equal(one[1], swapped[1])  # the middle row kept its key
    assert not np.array_equal(one[0], swapped[0])


# Mistakes.

attach = functools.partial(attach_lora, rngs=nnx.Rngs(0))


def test_a_pattern_without_a_match_names_the_nearest_modules(small_model):
    with pytest.raises(
        UserError, match="lora targets: 'decoder/layers/self_attn/qproj' matches none of 15 paths"
    ) as info:
        attach(nnx.clone(small_model), "decoder/layers/self_attn/qproj")
    assert "nearest are decoder/layers/self_attn/q_proj" in str(info.value)
    with pytest.raises(UserError, match="matches none"):
        attach(nnx.clone(small_model), "q_proj")  # a bare name is no path


def test_attaching_twice_is_refused_and_leaves_the_model_as_it_was(small_model):
    model = attach(nnx.clone(small_model), "decoder/.*/q_proj")
    before = set(param_tree.flatten(model))
    with pytest.raises(UserError, match="q_proj has a LoRA adapter already: merge or detach it"):
        attach(model, "decoder/.*/(o_proj|q_proj)")
    assert set(param_tree.flatten(model)) == before
    attach(detach_lora(model), "decoder/.*/q_proj")


@pytest.mark.parametrize("rank, dropout", [(0, 0.0), (-1, 0.0), (8, 1.0), (8, -0.1)])
def test_rank_and_dropout_out_of_range_are_refused(small_model, rank, dropout):
    with pytest.raises(UserError, match=f"lora has rank {rank} and dropout {dropout}, expected rank >= 1"):
        attach(nnx.clone(small_model), rank=rank, dropout=dropout)


def test_merging_without_adapters_is_refused(small_model):
    with pytest.raises(UserError, match="no LoRA adapters to merge"):
        merge_lora(nnx.clone(small_model))
