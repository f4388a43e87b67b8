"""What a model finds by `detect object`, generated as in use.

Beside the teacher-forced accuracy of task.py, which calls a text of boxes right where every coordinate is exact
to 1/1024, and so none.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from paligemma_jax.data.prompts import make_example
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from paligemma_jax.generation.generate import generate
from paligemma_jax.metrics.boxes import match, parse_boxes
from paligemma_jax.models.paligemma import PaliGemma

AT_ONCE = 20  # pictures
FOUND = 0.5  # IoU from which on an object counts as found


def detection_scores(
    model: PaliGemma,
    tokenizer: Tokenizer,
    images: Sequence[UInt8[np.ndarray, "I I 3"]],
    texts: Sequence[tuple[str, str]],
) -> dict[str, float]:
    """Greedy answers against the boxes asked for, matched by label (box_scores.match).

    Args:
      model: answers.
      tokenizer: its own.
      images: one a text.
      texts: prefix and suffix, "detect ..." and the boxes with their labels; every suffix holds one box at least.

    Returns:
      `detect_mean_iou`, the mean IoU over all objects, where one that is not found counts 0; and `detect_recall_50`,
      the share of objects that are found with an IoU of 0.5 or more.
    """
    longest = max(len(tokenizer.encode(prefix)) for prefix, _ in texts) + 1 + len(tokenizer.separator_ids)
    room = max(len(tokenizer.encode(suffix)) for _, suffix in texts) + 1
    rows = [make_example(tokenizer, prefix, None, longest) for prefix, _ in texts]
    overlaps = []
    for start in range(0, len(texts), AT_ONCE):
        part = [min(index, len(texts) - 1) for index in range(start, start + AT_ONCE)]  # filled up: one program does
        pixels = model.config.preprocessing.normalize(np.stack([images[index] for index in part]))
        prompt = (np.stack([rows[index][name] for index in part]) for name in ("tokens", "mask_input"))
        answers = np.asarray(generate(model, pixels, *prompt, room, tokenizer.eos_id))
        for index, answer in zip(range(start, min(start + AT_ONCE, len(texts))), answers, strict=False):
            overlaps.append(match(parse_boxes(tokenizer.decode(answer.tolist())), parse_boxes(texts[index][1])))
    found = np.concatenate(overlaps)
    return {"detect_mean_iou": float(found.mean()), "detect_recall_50": float((found >= FOUND).mean())}
