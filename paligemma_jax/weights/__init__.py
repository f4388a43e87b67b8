"""Checkpoint formats, read and written by declarative name tables."""

from paligemma_jax.weights.adapters.peft import load_peft, save_peft
from paligemma_jax.weights.adapters.prompt_folder import load_prompts, save_prompts
from paligemma_jax.weights.big_vision.paligemma import save_big_vision
from paligemma_jax.weights.hugging_face.paligemma import save_hugging_face
from paligemma_jax.weights.orbax.checkpoint import save_orbax

__all__ = [
    "load_peft",
    "load_prompts",
    "save_big_vision",
    "save_hugging_face",
    "save_orbax",
    "save_peft",
    "save_prompts",
]
