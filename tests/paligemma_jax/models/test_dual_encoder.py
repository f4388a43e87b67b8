"""SigLIP and CLIP against transformers and big_vision, and properties of a dual encoder's parts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.losses.contrastive.api import sigmoid_loss, softmax_loss
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig, unit
from paligemma_jax.models.encoder_block import quick_gelu
from paligemma_jax.models.text_encoder import TextConfig, TextEncoder
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree

# Tolerances of the golden READMEs.
EMBEDS, LOGITS, HIRES = 2e-5, 2e-4, 1e-4

TEXT = TextConfig(vocab_size=31, length=6, width=16, depth=2, mlp_dim=24, num_heads=2)
VISION = ViTConfig(image_size=12, patch_size=4, width=16, depth=2, mlp_dim=24, num_heads=2)


pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def small(make_random):
    """Random weights; read-only."""
    config = DualEncoderConfig(VISION, TEXT, embed_dim=16)
    return make_random(nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0))))


def with_config(model, **fields):
    """The same parameters under another config."""
    other = nnx.eval_shape(lambda: DualEncoder(model.config.replace(**fields), rngs=nnx.Rngs(0)))
    return param_tree.assign(other, param_tree.flatten(model))


@nnx.jit
def run(model, *inputs):
    return model(*inputs)


@nnx.jit
def encode_text(model, *inputs):
    return model.encode_text(*inputs)


@nnx.jit
def encode_image(model, images):
    return model.encode_image(images)


def close(ours, theirs, atol):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def images(seed, size):
    return jax.random.normal(jax.random.key(seed), (2, size, size, 3))


def channels_last(pixels):
    return jnp.asarray(pixels.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def siglip(golden):
    case, model = np.load(golden / "hf_siglip/case.npz"), load(golden / "hf_siglip")
    return case, model, run(model, channels_last(case["pixel_values"]), jnp.asarray(case["input_ids"], jnp.int32))


@pytest.fixture(scope="module")
def clip(golden):
    case, model = np.load(golden / "hf_clip/case.npz"), load(golden / "hf_clip")
    tokens, mask = jnp.asarray(case["input_ids"], jnp.int32), jnp.asarray(case["attention_mask"])
    return case, model, run(model, channels_last(case["pixel_values"]), tokens, mask)


@pytest.fixture(scope="module")
def big_vision(golden):
    case, model = np.load(golden / "bigvision_siglip/case.npz"), load(golden / "bigvision_siglip/params.npz")
    return case, model, run(model, jnp.asarray(case["image"]), jnp.asarray(case["text"], jnp.int32))


def test_siglip_equals_transformers(siglip):
    case, model, (images, texts, out) = siglip
    close(images, case["image_embeds"], EMBEDS)
    close(texts, case["text_embeds"], EMBEDS)
    close(model.logits(images, texts), case["logits_per_image"], LOGITS)
    close(out["vision/encoded"], case["image_last_hidden"], HIRES)
    close(out["image_features"], case["image_pooled"], HIRES)
    close(out["text_features"], case["text_pooled"], HIRES)
    loss = sigmoid_loss(images, texts, model.logit_scale[...], model.logit_bias[...])
    np.testing.assert_allclose(loss, case["loss"], rtol=2e-5)


def test_siglip_with_padding_masked_equals_transformers(siglip):
    case, model, _ = siglip
    texts, _ = encode_text(model, jnp.asarray(case["input_ids"], jnp.int32), jnp.asarray(case["attention_mask"]))
    close(texts, case["text_embeds_masked"], EMBEDS)


def test_clip_equals_transformers(clip):
    case, model, (images, texts, out) = clip
    close(images, case["image_embeds"], EMBEDS)
    close(texts, case["text_embeds"], EMBEDS)
    close(model.logits(images, texts), case["logits_per_image"], LOGITS)
    close(out["vision/blocks"], case["image_last_hidden"], HIRES)
    close(out["image_features"], case["image_projected"], HIRES)
    close(out["text_features"], case["text_projected"], HIRES)
    real = case["attention_mask"] == 1
    close(np.asarray(out["text/encoded"])[real], case["text_last_hidden"][real], HIRES)
    assert model.logit_bias is None
    np.testing.assert_allclose(softmax_loss(images, texts, model.logit_scale[...]), case["loss"], rtol=2e-5)


def test_clip_does_not_depend_on_its_padding_mask(clip):
    """Padding follows the pooled EOS, and the tower is causal."""
    case, model, (_, texts, _) = clip
    unmasked, _ = encode_text(model, jnp.asarray(case["input_ids"], jnp.int32))
    close(unmasked, texts, 1e-6)


def test_clip_of_the_first_configs_pools_the_largest_id(clip):
    case, model, _ = clip
    legacy = with_config(model, text=dict(eos_token=None))
    texts, _ = encode_text(legacy, jnp.asarray(case["legacy_input_ids"], jnp.int32))
    close(texts, case["legacy_text_embeds"], EMBEDS)


@pytest.mark.parametrize("name", ["hf_siglip", "hf_clip"])
def test_larger_images_equal_transformers(golden, name):
    case = np.load(golden / name / "case.npz")
    model = load(golden / name, image_size=case["hires_pixel_values"].shape[-1])
    assert model.config.preprocessing.size == case["hires_pixel_values"].shape[-1]
    close(encode_image(model, channels_last(case["hires_pixel_values"]))[0], case["hires_image_embeds"], HIRES)


def test_siglip_equals_big_vision(big_vision):
    case, model, (images, texts, out) = big_vision
    close(images, case["zimg"], 3e-6)
    close(texts, case["ztxt"], 3e-6)
    close(model.logits(images, texts), case["logits"], 3e-5)
    close(out["vision/encoded"], case["img_encoded"], 3e-5)
    close(out["image_features"], case["img_pre_logits"], 3e-5)
    close(out["text/encoded"], case["txt_transformed"], 3e-5)
    close(out["text/pooled"], case["txt_pre_logits"], 3e-5)


def test_stacked_layers_are_the_same_model(golden, big_vision):
    stacked = param_tree.flatten(load(golden / "bigvision_siglip/params_scan.npz"))
    for path, array in param_tree.flatten(big_vision[1]).items():
        np.testing.assert_array_equal(array, stacked[path], err_msg=path)


def test_gradients_of_the_sigmoid_loss_equal_big_visions(big_vision):
    case, model, _ = big_vision
    images, tokens = jnp.asarray(case["image"]), jnp.asarray(case["text"], jnp.int32)
    graph, arrays = param_tree.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss(arrays):
        model = param_tree.merge(graph, arrays)
        return sigmoid_loss(*model(images, tokens)[:2], model.logit_scale[...], model.logit_bias[...])

    value, grads = loss(arrays)
    close(value, case["sigmoid_loss"], 1.4e-5)
    whole = {
        "grad/t": grads["logit_scale"][None],
        "grad/b": grads["logit_bias"][None],
        "grad/img/MAPHead_0/probe": grads["image_head/probe"][None, None],
        "grad/img/embedding/kernel": grads["vision/patch_embedding/kernel"],
        "grad/txt/pos_embedding": grads["text/position_embedding"][None],
        "grad/txt/head/kernel": grads["text_projection/kernel"],
    }
    for name, grad in whole.items():
        np.testing.assert_allclose(grad, case[name], rtol=1e-4, atol=2e-6, err_msg=name)
    for i in range(model.config.vision.depth):
        norm = jnp.linalg.norm(grads["vision/layers/mlp/fc1/kernel"][i])
        theirs = case[f"grad_l2/img/Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/kernel"]
        np.testing.assert_allclose(norm, theirs, rtol=1e-4)


def test_unit_has_length_one_and_a_finite_gradient_at_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    close(unit(x), [[0.6, 0.8], [0, 0]], 1e-7)
    assert jnp.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()


def test_quick_gelu_by_hand():
    close(quick_gelu(jnp.asarray([0.0, 1.0, -2.0])), [0, 1 / (1 + math.exp(-1.702)), -2 / (1 + math.exp(3.404))], 1e-6)


def test_only_a_causal_tower_ignores_later_tokens(small):
    tokens = jnp.asarray([[3, 4, 5, 6, 7, 8]])
    changed = tokens.at[0, -1].set(9)
    for causal in (True, False):
        model = with_config(small, text=dict(causal=causal))
        first, second = (encode_text(model, each)[1]["text/encoded"][0, :-1] for each in (tokens, changed))
        assert bool(jnp.array_equal(first, second)) == causal


def test_shorter_texts_are_read_and_longer_ones_refused(small):
    _, out = encode_text(small, jnp.ones((2, 4), jnp.int32))
    np.testing.assert_array_equal(out["text/pooled"], out["text/encoded"][:, -1])
    with pytest.raises(ValueError, match="7 tokens, expected at most 6"):
        small.encode_text(jnp.ones((2, 7), jnp.int32))


def test_mean_pooling_is_the_mean_of_the_patches(small):
    config = small.config.replace(pool="gap")
    model = nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0)))
    arrays = {path: array for path, array in param_tree.flatten(small).items() if not path.startswith("image_head")}
    embeds, out = encode_image(param_tree.assign(model, arrays), images(0, 12))
    close(out["image_features"], out["vision/encoded"].mean(1), 1e-6)
    close(jnp.linalg.norm(embeds, axis=1), [1, 1], 1e-6)


def test_pixels_beyond_the_last_whole_patch_are_not_read(small):
    model, pixels = with_config(small, vision=dict(image_size=14)), images(0, 14)
    features = encode_image(model, pixels)[1]["vision/encoded"]
    assert features.shape == (2, 9, 16)
    cut = encode_image(model, pixels.at[:, 12:].set(0.0).at[:, :, 12:].set(0.0))[1]["vision/encoded"]
    np.testing.assert_array_equal(features, cut)


def test_invalid_configs_and_inputs_are_refused():
    with pytest.raises(ValueError, match="expected 'class' with one"):
        DualEncoderConfig(VISION, TEXT, embed_dim=16, pool="class")
    with pytest.raises(ValueError, match="expected the vision tower's width 16"):
        DualEncoderConfig(VISION, TEXT, embed_dim=8)


def test_rematerialisation_changes_nothing(small):
    tokens = jnp.asarray([[3, 1, 1], [4, 5, 1]])

    @nnx.jit
    @nnx.grad
    def gradient(text):
        return jnp.square(text(tokens)[0]).sum()

    again = with_config(small, both=dict(remat="block"))
    for ours, theirs in zip(jax.tree.leaves(gradient(small.text)), jax.tree.leaves(gradient(again.text)), strict=True):
        close(ours, theirs, 1e-4)


def test_bfloat16_computes_near_float32(siglip, golden):
    case, _, (images, texts, _) = siglip
    half = load(golden / "hf_siglip", "bfloat16", param_dtype="float32")
    low = run(half, channels_last(case["pixel_values"]), jnp.asarray(case["input_ids"], jnp.int32))
    for ours, theirs in zip(low[:2], (images, texts), strict=True):
        assert ours.dtype == jnp.float32
        close(jnp.sum(ours * theirs, axis=1), np.ones(len(ours)), 2e-3)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_pooling_head_is_attention_to_all_patches_without_their_keys_and_values(small):
    head = small.image_head
    x = jax.random.normal(jax.random.key(0), (3, 9, 16))

    def plainly(head, x):
        query = jnp.broadcast_to(head.probe[...][None, None], (len(x), 1, 16))
        pooled = head.attention(query, keys_from=x)
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]

    def gradients(function):
        return jax.jit(jax.grad(lambda head, x: jnp.sin(function(head, x)).sum(), argnums=(0, 1)))(head, x)

    close(head(x), plainly(head, x), 1e-5)
    ours, theirs = (param_tree.flatten(gradients(function)[0]) for function in (lambda head, x: head(x), plainly))
    for path in theirs:
        close(ours[path], theirs[path], 1e-4)
    assert flops(lambda head, x: head(x), head, x) < 0.6 * flops(plainly, head, x)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_block_of_a_text_tower_computes_the_pooled_position_alone(make_random, depth):
    config = dataclasses.replace(TEXT, depth=depth, unroll=True)
    text = make_random(nnx.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0))))
    tokens = jnp.arange(24).reshape(4, 6)
    mask = jnp.arange(6)[None] >= jnp.arange(4)[:, None]
    pooled, out = jax.jit(lambda text, tokens: text(tokens, mask))(text, tokens)
    close(pooled, out["encoded"][:, -1], 1e-5)
    close(out["encoded"], with_text(text, unroll=False)(tokens, mask)[1]["encoded"], 1e-5)
    whole = flops(lambda text, tokens: text(tokens, mask)[1]["encoded"], text, tokens)
    assert flops(lambda text, tokens: text(tokens, mask)[0], text, tokens) < (0.45 if depth == 1 else 0.75) * whole


def with_text(text, **fields):
    """The same parameters under another config."""
    other = nnx.eval_shape(lambda: TextEncoder(dataclasses.replace(text.config, **fields), rngs=nnx.Rngs(0)))
    return param_tree.assign(other, param_tree.flatten(text))
