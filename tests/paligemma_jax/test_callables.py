"""No result is of old weights: weights change between calls of every public function that computes with a model or
with a callable. One that is added must be listed here, with a case or with the reason why it needs none."""

import collections.abc
import functools
import inspect
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma
from tests.paligemma_jax.mini import MINI
from tests.paligemma_jax.test_zero_shot import CONFIG, tokenize

pytestmark = pytest.mark.usefixtures("fast_compilation")

TOKENS = np.array([[2, 9, 8, 7]])
IMAGES = np.random.default_rng(0).normal(size=(1, MINI.vision.image_size, MINI.vision.image_size, 3)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3), np.uint8)
PREPARED = PIXELS / 127.5 - 1
ROWS = [dict(image=image, tokens=tokenize(["cube"])[0][0], mask=np.ones(6, bool)) for image in PIXELS]


def logits(model, **options):
    return pg.generate(model, IMAGES, TOKENS, None, 2, -1, return_out=True, **options)[1]


def candidates(model):
    features = model.encode_image(jnp.asarray(IMAGES))[0]
    return pg.score_candidates(model, features, TOKENS, None, np.array([[5, 6]]), np.ones((1, 2), bool))


def in_micro_batches(embed):
    rows = PREPARED.astype(np.float32)
    return pg.losses.embed_in_micro_batches(lambda images: embed(images)[0], jnp.asarray(rows), 1)


@functools.cache
def jitted(model):
    """One compiled function of a model, as a user has it who compiles it once and trains on."""
    return functools.partial(jax.jit(lambda images: model.encode_image(images)[0]))


def in_jitted(model, micro_batch):
    return pg.losses.embed_in_micro_batches(jitted(model), jnp.asarray(PREPARED.astype(np.float32)), micro_batch)


zero = pg.zero_shot
PALIGEMMA = {
    "generate": lambda model: logits(model)["logits"],
    "generate, beams": lambda model: logits(model, sampler="beam", num_beams=2)["score"],
    "score_candidates": candidates,
}
DUAL = {
    "losses.embed_in_micro_batches": lambda model: in_micro_batches(model.encode_image),
    "losses.embed_in_micro_batches, a partial": lambda model: in_micro_batches(functools.partial(model.encode_image)),
    "losses.embed_in_micro_batches, a closure": lambda model: in_micro_batches(lambda rows: model.encode_image(rows)),
    "losses.embed_in_micro_batches, jit": lambda model: in_jitted(model, 1),
    "losses.embed_in_micro_batches, jit at once": lambda model: in_jitted(model, None),
    "zero_shot.class_embeddings": lambda model: zero.class_embeddings(model, tokenize, ["cube"]),
    "zero_shot.zero_shot": lambda model: zero.zero_shot(model, tokenize, PREPARED.astype(np.float32), ["cube"]),
    "zero_shot.embed_rows": lambda model: zero.embed_rows(
        model, {name: np.stack([row[name] for row in ROWS]) for name in ROWS[0]}
    )[0],
    "zero_shot.embed_images": lambda model: zero.embed_images(model, list(PIXELS)),
    "zero_shot.embed_pixels": lambda model: zero.embed_pixels(model, PIXELS),
    "zero_shot.embed_texts": lambda model: zero.embed_texts(model, tokenize, ["cube"]),
    "zero_shot.embed": lambda model: zero.embed(model, ROWS).images,
}
CHANGES_THE_MODEL = ("attach_lora", "attach_method", "attach_prompts", "dequantize", "detach_lora", "detach_prompts",
                     "merge_lora", "quantize", "with_vision")  # fmt: skip
WRITES_OR_READS_FILES = (
    "load",
    "weights.load_peft",
    "weights.load_prompts",
    "weights.save_big_vision",
    "weights.save_hugging_face",
    "weights.save_orbax",
    "weights.save_peft",
    "weights.save_prompts",
)
PURE = ("losses.coprompt_loss",)  # compiled by its caller, whose argument the model is
TELLS_SIZES = ("lora_table", "format_lora_table", "zero_shot.check_tokens")


def takes_callable(annotation) -> bool:
    """Whether a parameter is a callable or a model."""
    kinds = (collections.abc.Callable, nnx.Module)
    if annotation in kinds or typing.get_origin(annotation) in kinds:
        return True
    if inspect.isclass(annotation) and issubclass(annotation, nnx.Module):
        return True
    return any(takes_callable(part) for part in typing.get_args(annotation) if not isinstance(part, list))


def public_functions():
    for name in pg.__all__:
        value = getattr(pg, name)
        inside = isinstance(value, types.ModuleType)
        for inner, function in vars(value).items() if inside else [(None, value)]:
            if inspect.isclass(function) or not callable(function) or (inner or "").startswith("_"):
                continue
            if inside and function.__module__.split(".")[0] != "paligemma_jax":
                continue
            parameters = inspect.signature(function).parameters.values()
            if any(takes_callable(parameter.annotation) for parameter in parameters):
                yield f"{name}.{inner}" if inside else name


def test_every_public_function_that_takes_a_callable_or_a_model_is_listed():
    cases = {name.partition(",")[0] for name in PALIGEMMA | DUAL}
    others = {*CHANGES_THE_MODEL, *WRITES_OR_READS_FILES, *PURE, *TELLS_SIZES}
    assert set(public_functions()) <= cases | others, set(public_functions()) - cases - others


@pytest.mark.parametrize("name", PALIGEMMA | DUAL)
def test_jitted_functions_use_the_weights_of_the_call(name, make_random):
    kind, config = (PaliGemma, MINI) if name in PALIGEMMA else (DualEncoder, CONFIG)
    model = make_random(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    case = (PALIGEMMA | DUAL)[name]
    before = np.asarray(case(model))
    nnx.update(model, jax.tree.map(lambda leaf: 1.5 * leaf + 0.01, nnx.state(model, nnx.Param)))
    after = np.asarray(case(model))
    assert np.abs(after - before).max() > 1e-4
