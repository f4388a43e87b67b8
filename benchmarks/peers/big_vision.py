"""The program of big_vision's PaliGemma, with random weights of the folder's sizes and its Adam.

big_vision is no package: put a clone of google-research/big_vision on PYTHONPATH. It imports TensorFlow to access
files; where TensorFlow is missing, an empty module takes its place. Of its remat policies the one that keeps everything
is the fastest here.
"""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks.peers import inputs
from benchmarks.peers.turns import Work, serve

VARIANT = "benchmark"


def without_tensorflow() -> None:
    """Puts empty modules in TensorFlow's place."""
    import flax.training.checkpoints  # noqa: F401  (first, so that they see no TensorFlow)
    import orbax.checkpoint  # noqa: F401

    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorflow"].Tensor = sys.modules["tensorflow"].Variable = types.new_class("Tensor")
    sys.modules["tensorflow"].io = sys.modules["tensorflow.io"]
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]


def make_model(folder: Path):
    """Returns the model; its weights are made by `init`."""
    if importlib.util.find_spec("tensorflow") is None:
        without_tensorflow()
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    vision, text = inputs.sizes(folder)
    released, sizes = gemma.get_config, ml_collections.ConfigDict()
    sizes.update(
        variant=VARIANT,
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        mlp_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        vocab_size=text["vocab_size"],
        norm_eps=1e-6,
        scan=True,
        remat_policy="none",
    )
    gemma.get_config = lambda variant: sizes if variant == VARIANT else released(variant)
    tower = dict(
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"],
        patch_size=(vision["patch_size"],) * 2,
        pool_type="none",
        head_zeroinit=False,
        scan=True,
        remat_policy="everything_saveable",
    )
    frozen = ml_collections.FrozenConfigDict
    return paligemma.Model(img=frozen(tower), llm=frozen({"variant": VARIANT}))


def full_step(folder: Path) -> Work:
    """Returns a training step with the loss of its trainer, which is read."""
    model, optimizer = make_model(folder), optax.adam(inputs.RATE)
    images, tokens = jnp.asarray(inputs.pixels(folder)), jnp.asarray(np.pad(inputs.tokens(), ((0, 0), (0, 1))))
    at = jnp.arange(inputs.TEXT + 1)
    mask_ar = jnp.broadcast_to(at >= inputs.PROMPT, tokens.shape).astype(jnp.int32)
    mask_loss = mask_ar * (at < inputs.TEXT)
    params = jax.jit(model.init)(jax.random.key(0), images, tokens[:, :-1], mask_ar[:, :-1])["params"]
    state = optimizer.init(params)

    def loss_of(params):
        logits, _ = model.apply(
            {"params": params},
            images,
            tokens[:, :-1],
            mask_ar[:, :-1],
            train=True,
            rngs={"dropout": jax.random.key(0)},
        )
        targets = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
        scores = (jax.nn.log_softmax(logits) * targets).sum(-1) * mask_loss[:, 1:]
        return -(scores.sum(-1) / mask_loss[:, 1:].sum(-1)).mean()

    def update(params, state):
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    update = jax.jit(update, donate_argnums=(0, 1))

    def once() -> float:
        nonlocal params, state
        params, state, loss = update(params, state)
        return float(loss)

    return Work(once)


WORKS = {"full step": full_step}

if __name__ == "__main__":
    serve(WORKS)
