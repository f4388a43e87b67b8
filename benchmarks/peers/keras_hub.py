"""The program of KerasHub's PaliGemma on its JAX backend, with random weights of the folder's sizes.

Its LoRA adapts the query and output layers of the decoder; the factors of their three-dimensional kernels have other
shapes than ours.
"""

import functools
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
import keras_hub
import numpy as np

from benchmarks.peers import inputs
from benchmarks.peers.turns import Work, serve

TARGETS = ["query", "attention_output"]  # names of the decoder's layers alone


def make_model(folder: Path) -> keras_hub.models.PaliGemmaCausalLM:
    """Returns a model with random weights."""
    vision, text = inputs.sizes(folder)
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=text["vocab_size"],
        image_size=vision["image_size"],
        num_layers=text["num_hidden_layers"],
        num_query_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        hidden_dim=text["hidden_size"],
        intermediate_dim=2 * text["intermediate_size"],  # that of gate and up together
        head_dim=text["head_dim"],
        vit_patch_size=vision["patch_size"],
        vit_num_heads=vision["num_attention_heads"],
        vit_hidden_dim=vision["hidden_size"],
        vit_num_layers=vision["num_hidden_layers"],
        vit_intermediate_dim=vision["intermediate_size"],
    )
    return keras_hub.models.PaliGemmaCausalLM(preprocessor=None, backbone=backbone)


def step(folder: Path, lora: bool) -> Work:
    """Returns a training step whose loss is read."""
    model = make_model(folder)
    if lora:
        model.backbone.enable_lora(inputs.RANK, target_layer_names=TARGETS)
    model.compile(
        optimizer=keras.optimizers.AdamW(inputs.RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    tokens, at = inputs.tokens(), np.arange(inputs.TEXT)
    answer = np.broadcast_to(at >= inputs.PROMPT, tokens.shape).astype(np.int32)
    batch = {
        "images": inputs.pixels(folder),
        "token_ids": tokens,
        "padding_mask": np.ones_like(tokens),
        "response_mask": answer,
    }
    targets, weights = np.roll(tokens, -1, 1), np.roll(answer, -1, 1) * (at < inputs.TEXT - 1)

    def once() -> float:
        result = model.train_on_batch(batch, targets, sample_weight=weights.astype(np.float32))
        return float(np.asarray(result).ravel()[0])

    return Work(once)


def generation(folder: Path, count: int) -> Work:
    """Returns the generation of `count` tokens a row; of more than one, a later token of each row."""
    model = make_model(folder)
    model.compile(sampler="greedy")
    function = model.make_generate_function()

    def generate(count: int) -> list[list[int]]:
        padding = ((0, 0), (0, count))
        batch = {
            "images": inputs.pixels(folder),
            "token_ids": np.pad(inputs.tokens(), padding),
            "padding_mask": np.pad(np.ones((inputs.BATCH, inputs.TEXT), bool), padding),
        }
        return np.asarray(function(batch)["token_ids"])[:, inputs.TEXT :].tolist()

    if count == 1:
        return Work(lambda: generate(1))
    return Work(lambda: generate(count), lambda: generate(1), count - 1)


WORKS = {
    "LoRA step": functools.partial(step, lora=True),
    "full step": functools.partial(step, lora=False),
    "first token": functools.partial(generation, count=1),
    "decoded token": functools.partial(generation, count=inputs.NEW_TOKENS),
}

if __name__ == "__main__":
    serve(WORKS)
