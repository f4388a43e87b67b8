"""Builds the sequence that PaliGemma reads: the one place that knows prefix, separator, suffix, EOS and the masks.

A training example of length 10 (arrays one longer: the model reads all but the last, and is asked for all but the
first), prefix "how many cubes", suffix "two red":

    tokens      <bos> how many cubes \\n two red <eos> <pad> <pad> <pad>
    mask_ar       0    0   0     0    0  1   1    1     1     1     1     1: only later positions may look at this one
    mask_input    1    1   1     1    1  1   1    1     0     0     0     1: a real token
    mask_loss     0    0   0     0    0  1   1    1     0     0     0     1: the model is asked for this token

    model reads <bos> how many cubes \\n two red <eos> <pad> <pad>
    targets      how many cubes \\n two red <eos> <pad> <pad> <pad>
    weights       0    0   0    0   1   1    1     0     0     0

A prompt for generation has the first five columns, then pads. Prefix, separator and suffix are tokenised apart, so
the separator never merges with its neighbours and the prompt of generation is exactly the start of training's
(big_vision `transfers/common.py`; transformers' processor builds the same `bos + prompt + "\\n"`, then suffix + eos).
Image tokens are put in front by the model; they are no part of the text.

So `<bos>`, `<eos>`, `<pad>` and `<image>` have no place in a text. big_vision spells them out and transformers reads
them as tokens: neither is what whoever wrote them expects from both, and a text that holds one is refused, unless
`special_tokens` asks for them to be read as in transformers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_jax.data.row_texts import check_prompt
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from train_jax.core.errors import UserError, quoted

_ROWS = ("tokens", "targets", "mask_ar", "mask_input", "mask_loss", "weights")
_LINE = 120
SPECIAL_TOKENS = ("refuse", "parse")


class TruncationError(UserError):
    """A text that does not fit. Whoever reads the data decides whether it stops the run or is skipped and counted."""


def make_example(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str | None,
    length: int,
    *,
    prefix_length: int | None = None,
    suffix_length: int | None = None,
    special_tokens: str = "refuse",
) -> dict[str, np.ndarray]:
    """Tokens and masks of one example, padded on the right; see the rows at the top of the module.

    Args:
        tokenizer: encodes the three pieces.
        prefix: the prompt, without BOS, separator and image placeholders.
        suffix: the answer to learn, or None for a prompt that is to be continued.
        length: text positions that the model reads. With a suffix the arrays have `length + 1` entries, for the last
            token is only ever a target; without, `length`.
        prefix_length: most tokens that BOS + prefix + separator may have (default: no limit of its own).
        suffix_length: most tokens that suffix + EOS may have (likewise).
        special_tokens: what becomes of the marks in a text, "refuse" or "parse", see `encode`.

    Returns:
        `tokens` int32, `mask_ar` int32, `mask_input` bool, `mask_loss` bool.

    Raises:
        TruncationError: a part is longer than its limit or all of it than the arrays. Nothing is ever cut: a cut prefix
            asks another question, a cut suffix never teaches EOS.
        UserError: a text is none, or holds a mark, see `encode`.
    """
    if special_tokens == "parse":
        prefix = prefix.removeprefix(tokenizer.piece(tokenizer.image_id))  # where the image stands anyway
    head = [tokenizer.bos_id, *encode(tokenizer, prefix, special_tokens), *tokenizer.separator_ids]
    tail = [] if suffix is None else [*encode(tokenizer, suffix, special_tokens), tokenizer.eos_id]
    entries = length if suffix is None else length + 1
    _check("prefix with BOS and separator", len(head), prefix_length, prefix)
    _check("suffix with EOS", len(tail), suffix_length, suffix)
    _check("prefix and suffix together", len(head) + len(tail), entries, prefix)

    tokens = np.full(entries, tokenizer.pad_id, np.int32)
    tokens[: len(head) + len(tail)] = head + tail
    at = np.arange(entries)
    in_prefix, real = at < len(head), at < len(head) + len(tail)
    return {
        "tokens": tokens,
        "mask_ar": (~in_prefix).astype(np.int32),
        "mask_input": real,
        "mask_loss": real & ~in_prefix,
    }


def training_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a training step needs of `[..., T + 1]` arrays: inputs, targets and float32 weights, each `[..., T]`.

    NumPy and JAX arrays alike. `targets[t]` is the token after `tokens[t]`; `weights` are `mask_loss` of the targets.
    """
    inputs = {key: batch[key][..., :-1] for key in ("tokens", "mask_ar", "mask_input")}
    return inputs | {"targets": batch["tokens"][..., 1:], "weights": batch["mask_loss"][..., 1:].astype(np.float32)}


def format_batch(tokenizer: Tokenizer, batch: Mapping[str, Any]) -> str:
    """A batch as text: per example its tokens with every mask aligned below, trailing pads counted.

    `batch` holds `[B, L]` arrays under (some of) tokens, targets, mask_ar, mask_input, mask_loss, weights.
    """
    keys = [key for key in _ROWS if key in batch]
    examples = ({key: np.asarray(batch[key][index]) for key in keys} for index in range(len(batch["tokens"])))
    return "\n\n".join(f"example {index}\n{_format_example(tokenizer, rows)}" for index, rows in enumerate(examples))


def encode(tokenizer: Tokenizer, text: str, special_tokens: str = "refuse") -> list[int]:
    """Ids of a prefix, a suffix or a candidate, without what the format adds.

    Args:
        tokenizer: the model's.
        text: any.
        special_tokens: "refuse" refuses `<bos>`, `<eos>`, `<pad>` and `<image>` in it; "parse" reads the first three,
            and `<unk>`, as those tokens, as transformers does, and refuses `<image>`.

    Raises:
        UserError: no text, or one that holds what is refused, or `special_tokens` is something else.
    """
    check_prompt(text, "the text")
    if special_tokens not in SPECIAL_TOKENS:
        raise UserError(f"special_tokens is {special_tokens!r}, expected one of {', '.join(SPECIAL_TOKENS)}: set one.")
    parse = special_tokens == "parse"
    for mark in tokenizer.marks:
        if mark in text and (not parse or mark == tokenizer.piece(tokenizer.image_id)):
            remedy = (
                "leave it out"
                if parse
                else "remove it, or read such marks with data.special_tokens='parse' (--special_tokens)"
            )
            raise UserError(f"The text {quoted(text)} holds {mark}, which the format adds by itself; {remedy}.")
    return tokenizer.encode(text, marks=parse)


def _check(what: str, count: int, limit: int | None, text: str | None) -> None:
    if limit is not None and count > limit:
        raise TruncationError(
            f"The {what} has {count} tokens but {limit} fit ({quoted(text)}); raise the length or shorten the text."
        )


def _format_example(tokenizer: Tokenizer, rows: Mapping[str, np.ndarray]) -> str:
    # Up to the first pad, which shows how pads are masked.
    shown = np.flatnonzero(rows["tokens"] != tokenizer.pad_id).max(initial=-1) + 2
    pads = len(rows["tokens"]) - shown
    cells = {key: [_cell(tokenizer, key, value) for value in row[:shown]] for key, row in rows.items()}
    widths = [max(map(len, column)) for column in zip(*cells.values(), strict=True)]
    margin = max(map(len, rows)) + 2
    padded = {key: [cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for key, row in cells.items()}
    blocks = (
        "\n".join(key.ljust(margin) + " ".join(row[start:end]) for key, row in padded.items())
        for start, end in _wrap(widths, _LINE - margin)
    )
    return "\n\n".join(blocks) + (f"\n({pads} more <pad>)" if pads > 0 else "")


def _cell(tokenizer: Tokenizer, key: str, value: np.generic) -> str:
    if key in ("tokens", "targets"):
        return tokenizer.piece(int(value)).replace("\n", "\\n")
    return f"{float(value):.3g}"


def _wrap(widths: list[int], room: int) -> list[tuple[int, int]]:
    """Ranges of columns that fit a line each."""
    ranges, start, used = [], 0, 0
    for index, width in enumerate(widths):
        if used + width > room and index > start:
            ranges.append((start, index))
            start, used = index, 0
        used += width + 1
    return [*ranges, (start, len(widths))]
