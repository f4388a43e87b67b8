r"""Builds PaliGemma's token sequence and masks: prefix, separator, suffix, EOS. No other module does.

A training example of length 10, prefix "how many cubes", suffix "two red". Arrays have one more entry: the model reads
all but the last token and predicts all but the first.

    tokens      <bos> how many cubes \n two red <eos> <pad> <pad> <pad>
    mask_ar       0    0   0     0    0  1   1    1     1     1     1     1: only later positions attend to this one
    mask_input    1    1   1     1    1  1   1    1     0     0     0     1: a real token
    mask_loss     0    0   0     0    0  1   1    1     0     0     0     1: the model is trained to predict this token

    model reads <bos> how many cubes \n two red <eos> <pad> <pad>
    targets      how many cubes \n two red <eos> <pad> <pad> <pad>
    weights       0    0   0    0   1   1    1     0     0     0

A prompt for generation has the first five columns, then pads. Prefix, separator and suffix are tokenised separately, so
that the separator never merges with its neighbours, and a prompt for generation is exactly the start of a training
example (as in big_vision's `transfers/common.py`; transformers' processor builds the same `bos + prompt + "\n"`, then
suffix + eos). The model itself puts image tokens in front; they are not part of the text.

`<bos>`, `<eos>`, `<pad>` and `<image>` are therefore not allowed in texts. big_vision spells them out as characters and
transformers reads them as tokens, so a text that holds one is ambiguous. It is refused, unless `special_tokens` asks
for transformers' reading.
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
MASKS = ("mask_ar", "mask_input", "mask_loss")
"""Names of the arrays of an example beside `tokens`."""


class TruncationError(UserError):
    """A text that does not fit. The reader of the data decides whether this stops the run or skips the row."""


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
    """Returns tokens and masks of one example, padded on the right; the module's docstring shows them.

    Args:
        tokenizer: encodes the three parts.
        prefix: the prompt, without BOS, separator and image placeholders.
        suffix: the answer to learn, or None for a prompt to continue.
        length: text positions that the model reads. With a suffix the arrays have `length + 1` entries, as the last
            token is only a target; without, `length`.
        prefix_length: most tokens of BOS + prefix + separator; None: no separate limit.
        suffix_length: most tokens of suffix + EOS; None: no separate limit.
        special_tokens: treatment of special tokens in a text, "refuse" or "parse", see `encode`.

    Returns:
        `tokens` int32, `mask_ar` int32, `mask_input` bool, `mask_loss` bool.

    Raises:
        TruncationError: a part exceeds its limit, or the whole exceeds the arrays. Texts are never cut: a cut prefix is
            another question, and a cut suffix does not teach EOS.
        UserError: a value that is not text, or a text with a special token, see `encode`.
    """
    if special_tokens == "parse":
        prefix = prefix.removeprefix(tokenizer.piece(tokenizer.image_id))  # the image is in front anyway
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


def padded_length(length: int) -> int:
    """Returns the length, at least `length`, to which prompts are padded: one of a few, as each compiles a program.

    These are 16, 32, 48, 64, 96, 128, 192, 256, 384, ...: multiples of a quarter of the next power of two.
    """
    step = max(16, 1 << (length - 1).bit_length() >> 2)
    return -(-length // step) * step


def training_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a training step's inputs, targets and float32 weights, each `[..., T]`, from `[..., T + 1]` arrays.

    Takes NumPy and JAX arrays. `targets[t]` is the token after `tokens[t]`; `weights` are `mask_loss` of the targets.
    """
    inputs = {key: batch[key][..., :-1] for key in ("tokens", "mask_ar", "mask_input")}
    return inputs | {"targets": batch["tokens"][..., 1:], "weights": batch["mask_loss"][..., 1:].astype(np.float32)}


def format_batch(tokenizer: Tokenizer, batch: Mapping[str, Any]) -> str:
    """Returns a batch as text: per example its tokens with every mask aligned below; trailing pads are counted.

    `batch` holds `[B, L]` arrays under some of tokens, targets, mask_ar, mask_input, mask_loss, weights.
    """
    keys = [key for key in _ROWS if key in batch]
    examples = ({key: np.asarray(batch[key][index]) for key in keys} for index in range(len(batch["tokens"])))
    return "\n\n".join(f"example {index}\n{_format_example(tokenizer, rows)}" for index, rows in enumerate(examples))


def encode(tokenizer: Tokenizer, text: str, special_tokens: str = "refuse") -> list[int]:
    """Returns the ids of a prefix, a suffix or a candidate, without BOS, EOS and separator.

    Args:
        tokenizer: the model's.
        text: any text.
        special_tokens: "refuse" refuses `<bos>`, `<eos>`, `<pad>` and `<image>` in it; "parse" reads the first three,
            and `<unk>`, as tokens, as transformers does, and refuses `<image>`.

    Raises:
        UserError: not a text, a text with a refused token, or an unknown value of `special_tokens`.
    """
    check_prompt(text, "the text")
    if special_tokens not in SPECIAL_TOKENS:
        raise UserError(f"special_tokens is {special_tokens!r}, expected one of {', '.join(SPECIAL_TOKENS)}: set one.")
    parse = special_tokens == "parse"
    for token in tokenizer.marks:
        if token in text and (not parse or token == tokenizer.piece(tokenizer.image_id)):
            remedy = (
                "leave it out"
                if parse
                else "remove it, or read such marks with data.special_tokens='parse' (--special_tokens)"
            )
            raise UserError(f"The text {quoted(text)} holds {token}, which the format adds by itself; {remedy}.")
    return tokenizer.encode(text, marks=parse)


def _check(what: str, count: int, limit: int | None, text: str | None) -> None:
    if limit is not None and count > limit:
        raise TruncationError(
            f"The {what} has {count} tokens but {limit} fit ({quoted(text)}); raise the length or shorten the text."
        )


def _format_example(tokenizer: Tokenizer, rows: Mapping[str, np.ndarray]) -> str:
    # Up to the first pad, to show how pads are masked.
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
    """Returns ranges of columns that each fit one line."""
    ranges, start, used = [], 0, 0
    for index, width in enumerate(widths):
        if used + width > room and index > start:
            ranges.append((start, index))
            start, used = index, 0
        used += width + 1
    return [*ranges, (start, len(widths))]
