"""From a record to the arrays of a row; knows nothing of the weights, so that worker processes may have a copy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data import prompts
from paligemma_jax.data.records import BadRow, GuardedSource, Record, Source
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.errors import cut


@dataclasses.dataclass(frozen=True)
class Rows:
    """Prepares rows: tokenizer, preprocessing of the model's images, and the config's `data`."""

    tokenizer: Tokenizer
    preprocessing: Preprocessing
    data: ConfigDict

    def text(self, record: Record) -> dict[str, np.ndarray]:
        """Tokens [T + 1] and masks of a training row."""
        prefix_length, suffix_length = self.data.prefix_length, self.data.suffix_length
        return prompts.make_example(
            self.tokenizer,
            record.prefix,
            record.suffix,
            prefix_length + suffix_length - 1,
            prefix_length=prefix_length,
            suffix_length=suffix_length,
            special_tokens=self._special_tokens,
        )

    def prompt(self, record: Record) -> dict[str, np.ndarray]:
        """Tokens [prefix_length] and masks of a row to be answered."""
        length = self.data.prefix_length
        return prompts.make_example(
            self.tokenizer, record.prefix, None, length, prefix_length=length, special_tokens=self._special_tokens
        )

    @property
    def _special_tokens(self) -> str:
        return self.data.get("special_tokens", "refuse")  # older runs' configs lack the key

    def prompt_and_text(self, record: Record) -> dict[str, np.ndarray]:
        """A row to be answered whose answer is known: `prompt`, `prompt_mask`, and the training row's text."""
        prompt = self.prompt(record)
        return {"prompt": prompt["tokens"], "prompt_mask": prompt["mask_input"]} | self.text(record)

    def image(self, record: Record) -> dict[str, np.ndarray]:
        """The record's picture, resized to the model's input, uint8 [I, I, 3]; black where the config says so."""
        try:
            pixels = self.preprocessing.resize(self.preprocessing.decode(record.image))
        except BadRow as error:
            raise BadRow(f"{cut(record.image_name)}: {error}") from error
        return {"image": np.zeros_like(pixels) if self.data.blank_images else pixels}

    def image_and_text(self, record: Record) -> dict[str, np.ndarray]:
        """A training row."""
        return self.image(record) | self.text(record)

    def guarded(
        self, source: Source, prepare: Callable[[Record], dict[str, Any]], max_bad_fraction: float | None = None
    ) -> GuardedSource:
        """A source whose bad rows keep their slot with weight 0 (or stop the run, as the config says)."""
        data = self.data
        return GuardedSource(
            source,
            prepare,
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
            policies={prompts.TruncationError: data.on_truncation},
        )
