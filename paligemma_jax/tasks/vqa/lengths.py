"""Warns before training about references that do not fit into `eval.max_new_tokens`."""

import contextlib
from collections import Counter

from absl import logging

from paligemma_jax.data.records import BadRow, RecordSource, suffix_of
from paligemma_jax.data.tokenizers.paligemma import Tokenizer
from train_jax.core.errors import quoted


def warn_of_cut_references(tokenizer: Tokenizer, source: RecordSource, split: str, max_new_tokens: int) -> None:
    """Logs how many references of a source are longer than `max_new_tokens` tokens, and the longest."""
    counts = Counter()
    for index in range(len(source)):
        with contextlib.suppress(BadRow, OSError):  # reported when the row is read to be answered
            counts[suffix_of(source, index)] += 1
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
