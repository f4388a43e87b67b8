"""PaliGemma in JAX: load, adapt, fine-tune, generate.

import paligemma_jax as pg
model = pg.load("tiny")
tokens = pg.generate(model, images, prompt_tokens)
"""

from paligemma_jax import losses, metrics, weights, zero_shot
from paligemma_jax import moved as _moved  # noqa: F401  (old import paths)
from paligemma_jax.adapt.few_shot.learned_prompts import attach_prompts, detach_prompts
from paligemma_jax.adapt.few_shot.methods import FEW_SHOT_METHODS, attach_method, few_shot_method
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.adapt.lora.adapter import attach_lora, detach_lora, format_lora_table, lora_table, merge_lora
from paligemma_jax.adapt.quantization import nf4
from paligemma_jax.adapt.quantization.quantize import dequantize, quantize
from paligemma_jax.data.prompts import make_example
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.generation.candidate_scoring import score_candidates
from paligemma_jax.generation.generate import generate
from paligemma_jax.loading import load
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig, variant
from paligemma_jax.vision_start import with_vision

__all__ = [
    # Models
    "DualEncoder",
    "DualEncoderConfig",
    "PaliGemma",
    "PaliGemmaConfig",
    "load",
    "variant",
    "with_vision",
    # Text
    "generate",
    "load_text_tokenizer",
    "load_tokenizer",
    "make_example",
    "score_candidates",
    # Adapters and quantised bases
    "attach_lora",
    "dequantize",
    "detach_lora",
    "format_lora_table",
    "lora_table",
    "merge_lora",
    "quantize",
    # Prompts of a dual encoder
    "FEW_SHOT_METHODS",
    "PromptConfig",
    "attach_method",
    "attach_prompts",
    "detach_prompts",
    "few_shot_method",
    # Submodules
    "losses",
    "metrics",
    "nf4",
    "weights",
    "zero_shot",
]
