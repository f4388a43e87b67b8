"""Turns a record into the arrays of a row, without the weights, so that worker processes can have a copy.

`warn_of_cut_references` reports answers that are too long to be generated.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from paligemma_jax.data import prompts
from paligemma_jax.data.records import BadRow, GuardedSource, Record, RecordSource
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.errors import cut, quoted


@dataclasses.dataclass(frozen=True)
class RowProcessor:
    """Prepares rows with a tokenizer, the preprocessing of the model's images, and the config's `data`."""

    tokenizer: Tokenizer
    preprocessing: Preprocessing
    data: ConfigDict

    @property
    def text_limit(self) -> int:
        """Most tokens that the model reads of a training row's text: T, as the last token is only a target."""
        return self.data.prefix_length + self.data.suffix_length - 1

    def length(self, prefix: str, suffix: str) -> int:
        """Returns the number of tokens that the model reads of a training row with these texts.

        Raises:
          UserError: as `text`.
        """
        return int(self._example(prefix, suffix)["mask_input"].sum()) - 1

    def text(self, record: Record) -> dict[str, np.ndarray]:
        """Returns tokens [T + 1] and masks of a training row."""
        return self._example(record.prefix, record.suffix)

    def _example(self, prefix: str, suffix: str) -> dict[str, np.ndarray]:
        prefix_length, suffix_length = self.data.prefix_length, self.data.suffix_length
        return prompts.make_example(
            self.tokenizer,
            prefix,
            suffix,
            self.text_limit,
            prefix_length=prefix_length,
            suffix_length=suffix_length,
            special_tokens=self.data.special_tokens,
        )

    def prompt(self, record: Record) -> dict[str, np.ndarray]:
        """Returns tokens [prefix_length] and masks of a row to be answered."""
        length = self.data.prefix_length
        return prompts.make_example(
            self.tokenizer, record.prefix, None, length, prefix_length=length, special_tokens=self.data.special_tokens
        )

    def prompt_and_text(self, record: Record) -> dict[str, np.ndarray]:
        """Returns `prompt` and `prompt_mask` of a row to be answered, and the arrays of `text`."""
        prompt = self.prompt(record)
        return {"prompt": prompt["tokens"], "prompt_mask": prompt["mask_input"]} | self.text(record)

    def image(self, record: Record) -> dict[str, np.ndarray]:
        """Returns the record's image resized to the model's input, uint8 [I, I, 3]; black under `blank_images`."""
        try:
            pixels = self.preprocessing.resize(self.preprocessing.decode(record.image))
        except BadRow as error:
            raise BadRow(f"{cut(record.image_name)}: {error}") from error
        return {"image": np.zeros_like(pixels) if self.data.blank_images else pixels}

    def image_and_text(self, record: Record) -> dict[str, np.ndarray]:
        """Returns all arrays of a training row."""
        return self.image(record) | self.text(record)

    def guarded(
        self, source: RecordSource, prepare: Callable[[Record], dict[str, Any]], max_bad_fraction: float | None = None
    ) -> GuardedSource:
        """Returns a source whose bad rows keep their slot with weight 0, or stop the run under `on_error="raise"`.

        Args:
          source: the records.
          prepare: turns a record into arrays.
          max_bad_fraction: share of bad rows that is tolerated, in [0, 1]; None: as the config says.
        """
        data = self.data
        return GuardedSource(
            source,
            prepare,
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
            policies={prompts.TruncationError: data.on_truncation},
        )


def warn_of_cut_references(tokenizer: Tokenizer, source: RecordSource, split: str, max_new_tokens: int) -> None:
    """Logs how many references of a source are longer than `max_new_tokens` tokens, and the longest."""
    counts = Counter()
    for index in range(len(source)):
        with contextlib.suppress(BadRow, OSError):  # reported when the row is read to be answered
            counts[source.suffix(index)] += 1
    lengths = {text: len(tokenizer.encode(text)) for text in counts}
    longer = [text for text, length in lengths.items() if length > max_new_tokens]
    if longer:
        longest = max(longer, key=lengths.__getitem__)
        logging.warning(
            "%d of %d references of %r are longer than eval.max_new_tokens=%d, where answers are cut: none of these "
            "can be answered right. The longest has %d tokens (%s): set eval.max_new_tokens=%d or more.",
            sum(counts[text] for text in longer), counts.total(), split, max_new_tokens, lengths[longest],
            quoted(longest), lengths[longest] + 1,
        )  # fmt: skip
