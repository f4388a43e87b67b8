"""A procedural CLEVR: scenes, images, programs, questions and pretraining texts, all a function of a seed."""

# The world
from paligemma_jax.data.synthetic_clevr.attributes import (
    ANSWERS,
    ATTRIBUTES,
    COLORS,
    MATERIALS,
    RELATIONS,
    SHAPES,
    SIZES,
)

# Files in the official layout
from paligemma_jax.data.synthetic_clevr.build import VERSION, build_tree, encode_png, is_built, split_scene
from paligemma_jax.data.synthetic_clevr.geometry import boxes, visible_pixels

# Questions and texts
from paligemma_jax.data.synthetic_clevr.meanings import FAMILIES
from paligemma_jax.data.synthetic_clevr.pretraining_texts import pretraining_segments
from paligemma_jax.data.synthetic_clevr.programs import InvalidProgram, answer, execute, last_function
from paligemma_jax.data.synthetic_clevr.questions import AnswerBalance, generate_questions
from paligemma_jax.data.synthetic_clevr.renderer import render
from paligemma_jax.data.synthetic_clevr.scenes import relationships, sample_scene

__all__ = [
    "ANSWERS",
    "ATTRIBUTES",
    "COLORS",
    "FAMILIES",
    "MATERIALS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "VERSION",
    "AnswerBalance",
    "InvalidProgram",
    "answer",
    "boxes",
    "build_tree",
    "encode_png",
    "execute",
    "generate_questions",
    "is_built",
    "last_function",
    "pretraining_segments",
    "relationships",
    "render",
    "sample_scene",
    "split_scene",
    "visible_pixels",
]
