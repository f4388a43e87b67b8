"""Golden cases and the models read from them, shared by the tests of models, weights and adapters."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.projection import projections
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree

GOLDEN = Path(__file__).parent.parent / "golden"

# Sizes that are pairwise different wherever a mix-up of axes could hide, and divisible by 2 for sharding.
SMALL = PaliGemmaConfig(
    vision=ViTConfig(image_size=12, patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2),
    decoder=GemmaConfig(vocab_size=64, width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8),
)


def our_layout(stored, patches):
    """Converts a batch stored by transformers (NCHW images, image placeholders in the text) to our model's inputs."""
    text = {name: stored[name][:, patches:] for name in ("input_ids", "token_type_ids", "attention_mask", "labels")}
    labels = np.concatenate([text["labels"][:, 1:], np.full_like(text["labels"][:, :1], -100)], axis=1)
    return SimpleNamespace(
        stored=stored,
        patches=patches,
        inputs=dict(
            images=jnp.asarray(stored["pixel_values"].transpose(0, 2, 3, 1)),
            tokens=jnp.asarray(text["input_ids"], jnp.int32),
            mask_ar=jnp.asarray(text["token_type_ids"], jnp.int32),
            mask_input=jnp.asarray(text["attention_mask"], bool),
        ),
        real=text["attention_mask"] == 1,
        targets=jnp.asarray(np.maximum(labels, 0), jnp.int32),
        weights=jnp.asarray(labels >= 0, jnp.float32),
    )


@pytest.fixture(scope="session")
def golden():
    """The folder of golden cases."""
    return GOLDEN


@pytest.fixture(scope="session")
def big_vision_case():
    return dict(np.load(GOLDEN / "bigvision_paligemma/case.npz"))


@pytest.fixture(scope="session")
def big_vision_model():
    """Read-only: a test that changes it works on `nnx.clone`."""
    return load(GOLDEN / "bigvision_paligemma/params.npz")


@pytest.fixture(scope="session")
def hugging_face_model():
    """Read-only: a test that changes it works on `nnx.clone`."""
    return load(GOLDEN / "hf_paligemma")


@pytest.fixture(scope="session")
def hugging_face_case(hugging_face_model):
    stored = dict(np.load(GOLDEN / "hf_paligemma/case.npz"))
    return our_layout(stored, hugging_face_model.config.vision.num_patches)


@pytest.fixture(scope="session")
def gemma_2_model():
    """PaliGemma 2 of transformers; read-only."""
    return load(GOLDEN / "hf_paligemma2")


@pytest.fixture(scope="session")
def gemma_2_case(gemma_2_model):
    stored = dict(np.load(GOLDEN / "hf_paligemma2/case.npz"))
    return our_layout(stored, gemma_2_model.config.vision.num_patches)


@pytest.fixture(scope="session")
def peft_case(hugging_face_model):
    stored = dict(np.load(GOLDEN / "hf_peft_lora/case.npz"))
    return our_layout(stored, hugging_face_model.config.vision.num_patches)


@pytest.fixture(scope="session")
def peft_training_case(hugging_face_model):
    stored = dict(np.load(GOLDEN / "hf_lora_training/case.npz"))
    return our_layout(stored, hugging_face_model.config.vision.num_patches)


@pytest.fixture(scope="session")
def small_config():
    return SMALL


def randomised(model, seed=0):
    """Fills an abstract module with random leaves: kernels of unit gain, no bias or scale at its initial value.

    Numpy draws them, as compiling a module's own initialisers takes longer than most tests.
    """
    rng = np.random.default_rng(seed)
    fan_in = {f"{path}/kernel": math.prod(module.in_shape) for path, module in projections(model).items()}
    arrays = {}
    for path, leaf in param_tree.abstract(model).items():
        array = rng.standard_normal(leaf.shape)
        array = array * fan_in[path] ** -0.5 if path in fan_in else 0.2 * array
        arrays[path] = jnp.asarray(array, leaf.dtype)
    return param_tree.assign(model, arrays)


@pytest.fixture(scope="session")
def make_random():
    return randomised


@pytest.fixture(scope="session")
def small_model():
    """Random weights; read-only."""
    return randomised(nnx.eval_shape(lambda: PaliGemma(SMALL, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="session")
def small_batch():
    """Three rows: [BOS prefix SEP suffix EOS PAD...] of different lengths."""
    rng = np.random.default_rng(0)
    prefix, suffix, length = (3, 5, 2), (2, 1, 3), 8
    tokens, mask_ar, mask_input = (np.zeros((3, length), np.int32) for _ in range(3))
    for row, (p, s) in enumerate(zip(prefix, suffix, strict=True)):
        tokens[row, : p + s] = rng.integers(3, 64, p + s)
        mask_ar[row, p:] = 1
        mask_input[row, : p + s] = 1
    images = rng.uniform(-1, 1, (3, 12, 12, 3)).astype(np.float32)
    return dict(
        images=jnp.asarray(images),
        tokens=jnp.asarray(tokens),
        mask_ar=jnp.asarray(mask_ar),
        mask_input=jnp.asarray(mask_input, bool),
    )
