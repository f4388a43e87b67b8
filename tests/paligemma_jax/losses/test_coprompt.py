"""CoPrompt's loss: closed forms, which branch gets gradients, and which terms are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.losses.coprompt import class_cross_entropy, consistency_loss, coprompt_loss
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from train_jax.core import param_tree
from train_jax.core.errors import UserError


def clip_like(width, depth, pixels, length, remat="none"):
    sizes = dict(width=width, depth=depth, mlp_dim=4 * width, num_heads=4, remat=remat)
    return DualEncoderConfig(
        ViTConfig(pixels, 8, class_token=True, **sizes),
        TextConfig(64, length, causal=True, pool="eos", eos_token=63, **sizes),
        embed_dim=width // 2,
        pool="class",
        image_projection=True,
        projection_bias=False,
        initial_bias=None,
    )


def rows(seed, n=4, width=5):
    x = np.random.default_rng(seed).standard_normal((n, width))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


def test_cross_entropy_is_optax_and_rows_of_weight_zero_do_not_count():
    logits, labels = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), jnp.asarray([0, 2, 1, 1])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(class_cross_entropy(logits, labels), each.mean(), rtol=1e-6)
    weights = jnp.asarray([1.0, 0.0, 0.5, 1.0])
    spoiled = logits.at[1].set(jnp.inf)
    expected = (weights * each).sum() / weights.sum()
    np.testing.assert_allclose(class_cross_entropy(spoiled, labels, weights), expected, rtol=1e-6)
    assert class_cross_entropy(spoiled, labels, jnp.zeros(4)) == 0
    gradient = jax.grad(lambda logits: class_cross_entropy(logits, labels, weights))(logits)
    assert (gradient[1] == 0).all()


def test_kinds_by_hand():
    tuned, frozen = jnp.asarray([[1.0, 0.0], [0.6, 0.8]]), jnp.asarray([[0.0, 1.0], [1.0, 0.0]])
    weights = jnp.asarray([1.0, 3.0])
    for kind, each in (("cosine", (1.0, 0.4)), ("l1", (1.0, 0.6)), ("mse", (1.0, 0.4))):
        np.testing.assert_allclose(consistency_loss(tuned, frozen, kind), sum(each) / 2, rtol=1e-6)
        np.testing.assert_allclose(
            consistency_loss(tuned, frozen, kind, weights), (each[0] + 3 * each[1]) / 4, rtol=1e-6
        )
        assert float(consistency_loss(tuned, tuned, kind)) == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(consistency_loss(7 * tuned, 0.1 * frozen), 0.7, rtol=1e-6)
    with pytest.raises(UserError, match="the consistency is 'cos', expected one of cosine, l1, mse"):
        consistency_loss(tuned, frozen, "cos")


@pytest.mark.parametrize("kind", ["cosine", "l1", "mse"])
def test_gradients_flow_to_the_tuned_branch_alone(kind):
    tuned, frozen = jax.grad(consistency_loss, argnums=(0, 1))(rows(0), rows(1), kind)
    assert (frozen == 0).all() and (jnp.abs(tuned).max(axis=1) > 0).all()


@pytest.fixture(scope="module")
def small(fast_compilation, make_random):
    """Read-only."""

    def make():
        prompts = pg.PromptConfig(2, 2, 2, text_adapter=4, image_adapter=4)
        model = DualEncoder(clip_like(16, 2, 16, 8), rngs=nnx.Rngs(0))
        return pg.attach_prompts(model, prompts, rngs=nnx.Rngs(1))

    return make_random(nnx.eval_shape(make))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    images, augmented = (jnp.asarray(rng.normal(size=(3, 16, 16, 3)), jnp.float32) for _ in range(2))
    tokens = jnp.asarray([[1, 5, 6, 7, 63, 0, 0, 0], [1, 5, 6, 8, 63, 0, 0, 0]])
    return dict(images=images, labels=jnp.asarray([0, 1, 1]), tokens=tokens) | dict(
        images_augmented=augmented,
        descriptions=tokens.at[:, 4].set(9).at[:, 5].set(63),
        weights=jnp.asarray([1, 1, 0.0]),
    )


def test_the_loss_is_the_sum_of_its_parts(small, batch):
    @jax.jit
    def run(model, batch):
        frozen = model.encode_text(batch["descriptions"], prompts=False)[0]
        images = model.encode_image(batch["images_augmented"], prompts=False)[0]
        given = {name: array for name, array in batch.items() if name != "descriptions"} | {"frozen_text": frozen}
        return coprompt_loss(model, batch, 2.5, "mse"), coprompt_loss(model, given, 2.5, "mse")[0], images, frozen

    (loss, parts), same, images, frozen = run(small, batch)
    np.testing.assert_allclose(parts["text"], jnp.square(parts["text_embeds"] - frozen).mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["image"], jnp.square(parts["image_embeds"] - images)[:2].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, parts["ce"] + 2.5 * (parts["text"] + parts["image"]), rtol=1e-6)
    np.testing.assert_allclose(same, loss, rtol=1e-6)


def test_arrays_that_are_not_used_may_be_missing(small, batch):
    """The loss can be traced with a batch that lacks the unused arrays."""

    def parts(keys, *arguments, **options):
        given = {key: batch[key] for key in ("images", "labels", "tokens", *keys)}
        loss = lambda model, batch: coprompt_loss(model, batch, *arguments, **options)  # noqa: E731
        return set(jax.eval_shape(loss, small, given)[1]) - {"logits", "image_embeds", "text_embeds"}

    assert parts(()) == {"ce"}
    assert parts(("descriptions",), 1, on="text") == {"ce", "text"}
    assert parts(("images_augmented",), 1, on="image") == {"ce", "image"}
    with pytest.raises(UserError, match="the consistency is on 'words', expected one of text, image, both"):
        coprompt_loss(small, batch, 1.0, on="words")


def test_a_step_of_training_leaves_the_base_alone(small, batch):
    """Ten steps of gradient descent: the loss falls, prompts move, and the frozen branch stays to the bit."""
    graph, arrays = param_tree.split(small)
    chosen = {path: leaf for path, leaf in arrays.items() if path.startswith("prompts/")}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in chosen}
    embed = jax.jit(lambda model: model(batch["images"], batch["tokens"], prompts=False)[:2])
    before = embed(small)

    @jax.jit
    def step(chosen):
        loss = lambda chosen: coprompt_loss(param_tree.merge(graph, frozen | chosen), batch, 1.0)[0]  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(chosen)
        return value, jax.tree.map(lambda leaf, gradient: leaf - 0.02 * gradient, chosen, gradients)

    values = []
    for _ in range(10):
        value, chosen = step(chosen)
        values.append(float(value))
    assert values[-1] < values[0]
    after = embed(param_tree.merge(graph, frozen | chosen))
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
