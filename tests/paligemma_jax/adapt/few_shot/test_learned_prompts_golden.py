"""CoPrompt's released code on a tiny CLIP: features, logits, every term of the loss, gradients of all that trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.adapt.few_shot.learned_prompts import TRAINABLE
from train_jax.core import param_tree, patterns

# Tolerances as the golden README asks.
FEATURES, LOGITS = dict(rtol=0, atol=1e-4), dict(rtol=0, atol=2e-4)
GRADIENTS = dict(rtol=1e-3, atol=1e-5)

pytestmark = pytest.mark.usefixtures("fast_compilation")


def ours(case, prefix):
    """Their arrays (Linear weights are out, in; a prompt and a map for each layer) under our paths, layers stacked."""
    deep = range(sum(name.startswith(f"{prefix}/deep_proj") and name.endswith("_w") for name in case))

    def layers(first, others):
        return np.stack([case[f"{prefix}/{name}"] for name in (first, *(others.format(i) for i in deep))])

    arrays = {
        "prompts/text": layers("ctx", "deep{}"),
        "prompts/coupling/kernel": layers("proj_w", "deep_proj{}_w").swapaxes(1, 2),
        "prompts/coupling/bias": layers("proj_b", "deep_proj{}_b"),
    }
    for side in ("image", "text"):
        for part in ("down", "up"):
            arrays[f"prompts/{side}_adapter/{part}_kernel"] = case[f"{prefix}/adapter_{side}_{part}"].T
    return {path: jnp.asarray(array) for path, array in arrays.items()}


def attached(base, case):
    """The base with the case's prompts; all sizes are read from its arrays."""
    arrays = ours(case, "prompt")
    depth, tokens, _ = arrays["prompts/text"].shape
    config = pg.PromptConfig(
        text_tokens=tokens,
        vision_tokens=tokens,
        depth=depth,
        text_adapter=arrays["prompts/text_adapter/down_kernel"].shape[1],
        image_adapter=arrays["prompts/image_adapter/down_kernel"].shape[1],
        text_mix=float(case["text_mix"]),
        image_mix=float(case["image_mix"]),
    )
    return param_tree.assign(pg.attach_prompts(base, config, rngs=nnx.Rngs(0)), arrays)


@pytest.fixture(scope="module")
def case(golden):
    return dict(np.load(golden / "coprompt/case.npz"))


@pytest.fixture(scope="module")
def model(golden, case):
    """Read-only."""
    return attached(pg.load(golden / "coprompt/base"), case)


@pytest.fixture(scope="module")
def batch(case):
    pixels = {name: jnp.asarray(case[name].transpose(0, 2, 3, 1)) for name in ("images", "images_augmented")}
    return pixels | {name: jnp.asarray(case[name], jnp.int32) for name in ("tokens", "descriptions", "labels")}


@pytest.fixture(scope="module")
def trained(model, batch, case):
    """Loss, its parts, and gradients by the function that training differentiates."""
    graph, arrays = param_tree.split(model)
    chosen = {path: arrays[path] for path in patterns.select(TRAINABLE, arrays)}
    frozen = {path: array for path, array in arrays.items() if path not in chosen}

    @jax.jit
    def step(chosen, frozen, batch):
        def loss(chosen):
            return pg.losses.coprompt_loss(param_tree.merge(graph, chosen | frozen), batch, float(case["lam"]))

        return jax.value_and_grad(loss, has_aux=True)(chosen)

    (value, parts), gradients = step(chosen, frozen, batch)
    return value, parts, gradients


def test_embeddings_and_logits(model, batch, case, trained):
    _, parts, _ = trained
    _, _, out = jax.jit(lambda model: model(batch["images"], batch["tokens"]))(model)
    np.testing.assert_allclose(out["image_features"], case["image_features_raw"], **FEATURES)
    np.testing.assert_allclose(out["text_features"], case["text_features_raw"], **FEATURES)
    np.testing.assert_allclose(parts["image_embeds"], case["image_features"], **FEATURES)
    np.testing.assert_allclose(parts["text_embeds"], case["text_features"], **FEATURES)
    np.testing.assert_allclose(parts["logits"], case["logits"], **LOGITS)


def test_terms_of_the_loss(case, trained):
    value, parts, _ = trained
    for name, ours in (
        ("loss", value),
        ("loss_ce", parts["ce"]),
        *((f"loss_{s}", parts[s]) for s in ("text", "image")),
    ):
        np.testing.assert_allclose(ours, case[name], **FEATURES, err_msg=name)


def test_gradients_of_all_that_trains(case, trained):
    expected = ours(case, "grad")
    assert set(trained[2]) == set(expected)
    for path, gradient in trained[2].items():
        np.testing.assert_allclose(gradient, expected[path], **GRADIENTS, err_msg=path)


def test_the_frozen_branch_is_the_base(model, batch, case, golden):
    """To the transformers' values, and to the bit what the model was before prompts were attached."""
    base = pg.load(golden / "coprompt/base")
    run = jax.jit(lambda model: model(batch["images_augmented"], batch["descriptions"], prompts=False)[:2])
    frozen, plain = run(model), run(base)
    for ours, before, theirs in zip(frozen, plain, (case["frozen_image"], case["frozen_text"]), strict=True):
        np.testing.assert_allclose(ours, theirs, **FEATURES)
        np.testing.assert_array_equal(ours, before)
