"""Scores of the boxes that a model generates for `detect object`.

The teacher-forced accuracy of task.py says little about them: it counts a text of boxes as right only if every
coordinate is exact to 1/1024.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from paligemma_jax.data.prompts import make_example
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from paligemma_jax.generation.generate import generate
from paligemma_jax.metrics.boxes import match, parse_boxes
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.common import normalize

BATCH = 20  # images
MIN_IOU = 0.5  # of an object that counts as detected


def detection_scores(
    model: PaliGemma,
    tokenizer: Tokenizer,
    images: Sequence[UInt8[np.ndarray, "I I 3"]],
    texts: Sequence[tuple[str, str]],
) -> dict[str, float]:
    """Compares greedy answers with the reference boxes, matched by label (metrics.boxes.match).

    Args:
      model: to measure.
      tokenizer: of the model.
      images: uint8 [0, 255], one a text.
      texts: prefix and suffix, "detect ..." and the boxes with their labels; every suffix has at least one box.

    Returns:
      `detect_mean_iou`, the mean IoU over all objects, 0 for an object without a match; and `detect_recall_50`, the
      share of objects with an IoU of 0.5 or more.
    """
    prompt_length = max(len(tokenizer.encode(prefix)) for prefix, _ in texts) + 1 + len(tokenizer.separator_ids)
    max_new_tokens = max(len(tokenizer.encode(suffix)) for _, suffix in texts) + 1
    rows = [make_example(tokenizer, prefix, None, prompt_length) for prefix, _ in texts]
    overlaps = []
    for start in range(0, len(texts), BATCH):
        part = [min(index, len(texts) - 1) for index in range(start, start + BATCH)]  # padded: one compiled program
        pixels = normalize(model, np.stack([images[index] for index in part]))
        tokens, mask = (np.stack([rows[index][name] for index in part]) for name in ("tokens", "mask_input"))
        answers = np.asarray(generate(model, pixels, tokens, mask, max_new_tokens, tokenizer.eos_id))
        for index, answer in zip(range(start, min(start + BATCH, len(texts))), answers, strict=False):
            overlaps.append(match(parse_boxes(tokenizer.decode(answer.tolist())), parse_boxes(texts[index][1])))
    ious = np.concatenate(overlaps)
    return {"detect_mean_iou": float(ious.mean()), "detect_recall_50": float((ious >= MIN_IOU).mean())}
