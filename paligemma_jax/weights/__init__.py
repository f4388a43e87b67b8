"""Checkpoint formats, read and written by declarative name tables."""

from paligemma_jax.weights.big_vision import save_big_vision
from paligemma_jax.weights.hugging_face import save_hugging_face
from paligemma_jax.weights.native import save_orbax
from paligemma_jax.weights.peft import load_peft, save_peft
from paligemma_jax.weights.prompt_folder import load_prompts, save_prompts

__all__ = [
    "load_peft",
    "load_prompts",
    "save_big_vision",
    "save_hugging_face",
    "save_orbax",
    "save_peft",
    "save_prompts",
]
