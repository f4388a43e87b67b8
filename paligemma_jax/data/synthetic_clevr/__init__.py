"""A procedural CLEVR: scenes, pictures, programs, questions and pretraining texts, from a seed and nothing else."""

# The world
from .attributes import ANSWERS, ATTRIBUTES, COLORS, MATERIALS, RELATIONS, SHAPES, SIZES

# Files in the official layout
from .build import VERSION, build_tree, encode_png, is_built, split_scene
from .geometry import boxes, visible_pixels

# Questions and texts
from .meanings import FAMILIES
from .pretraining_texts import pretraining_segments
from .programs import InvalidProgram, answer, execute, last_function
from .questions import AnswerBalance, generate_questions
from .render import render
from .scenes import relationships, sample_scene

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
