"""Inputs of the works that are compared, and the sizes of the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 4
TEXT, PROMPT = 64, 32  # tokens of a row, and those of them that no loss supervises
NEW_TOKENS = 32
RANK, ALPHA = 8, 32
RATE = 1e-4  # of AdamW
EVAL_BATCH, ANSWER_TOKENS = 16, 4
QUESTIONS = "questions.jsonl"  # in the folder of the model: {"image", "prefix", "suffix"} a line


def sizes(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the sizes of the vision tower and of the decoder, by transformers' names."""
    config = json.loads((folder / "config.json").read_text())
    return config["vision_config"], config["text_config"]


def images(folder: Path) -> np.ndarray:
    """Returns uint8 [B, I, I, 3]."""
    side = sizes(folder)[0]["image_size"]
    return np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3)).astype(np.uint8)


def pixels(folder: Path) -> np.ndarray:
    """Returns the images as float32 [B, I, I, 3] in [-1, 1]."""
    return images(folder).astype(np.float32) / 127.5 - 1


def tokens() -> np.ndarray:
    """Returns int32 [B, T], a prompt and an answer without padding."""
    return np.random.default_rng(1).integers(3, 1000, (BATCH, TEXT)).astype(np.int32)


def questions(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of QUESTIONS."""
    return [json.loads(line) for line in (folder / QUESTIONS).read_text().splitlines()]
