"""Scores of answers given as text: exact match, accuracy per question family, ROUGE.

ROUGE follows Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries" (https://aclanthology.org/W04-1013),
one reference per prediction, F with beta = 1. ROUGE-1, 2, 3 and L come from the `rouge-score` library; S and W are
implemented here:

ROUGE-S  skip-bigrams: pairs of words in sentence order with any gap (section 4), counted with multiplicity. P and R
         divide the common pairs by the n (n - 1) / 2 pairs of the prediction and of the reference.
ROUGE-W  weighted longest common subsequence (section 3.3): a run of k consecutive matches has the weight f(k) = k^1.2,
         as in Lin's evaluations. P and R are f^-1(WLCS / f(n)) for n words of prediction and reference.

Words are runs of letters, digits and combining marks of any script, lower-cased; on ASCII text this equals the
library's tokenizer without stemming. A script written without spaces gives one word per run. A score is 0 if prediction
or reference has no units to count: for an empty text all six, for a single word ROUGE-2, 3 and S, even if equal.
"""

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ROUGE_TYPES = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeS", "rougeW")
_FIELDS = ("precision", "recall", "f1")
_LIBRARY_TYPES = ROUGE_TYPES[:4]
_WEIGHT = 1.2  # exponent of ROUGE-W


def exact_match(prediction: str, reference: str) -> bool:
    """Returns whether two texts are equal after stripping white space at both ends; case and inner spaces count."""
    return prediction.strip() == reference.strip()


class Accuracy:
    """Accuracy overall and per question family, from counts that can be summed across processes."""

    def __init__(self) -> None:
        self.correct: Counter[str] = Counter()
        self.total: Counter[str] = Counter()

    def add(self, correct: bool, family: str = "") -> None:
        """Counts one answer; `family` is the kind of its question."""
        self.correct[family] += bool(correct)
        self.total[family] += 1

    @property
    def examples(self) -> int:
        """Number of answers counted."""
        return self.total.total()

    @property
    def overall(self) -> float:
        """Correct answers / all answers, in [0, 1]. Raises ZeroDivisionError if there are none."""
        return self.correct.total() / self.examples

    def by_family(self) -> dict[str, float]:
        """Returns the accuracy of each family, in [0, 1], in alphabetical order."""
        return {family: self.correct[family] / self.total[family] for family in sorted(self.total)}


class RougeSums:
    """ROUGE over a stream of pairs in constant memory; `sums` and `pairs` can be summed across processes."""

    def __init__(self) -> None:
        self.sums = np.zeros((len(ROUGE_TYPES), len(_FIELDS)))  # float64, rows ROUGE_TYPES, columns P, R, F1
        self.pairs = 0

    def add(self, prediction: str, reference: str) -> None:
        """Adds one pair."""
        self.sums += _score_pair(prediction, reference)
        self.pairs += 1

    def result(self) -> dict[str, dict[str, float]]:
        """Returns the means over the pairs, {"rouge1": {"precision", "recall", "f1"}, ...}.

        Raises:
          ValueError: there are no pairs.
        """
        if not self.pairs:
            raise ValueError("ROUGE of no pairs is not defined.")
        means = self.sums / self.pairs
        return {
            name: dict(zip(_FIELDS, row.tolist(), strict=True)) for name, row in zip(ROUGE_TYPES, means, strict=True)
        }


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the mean precision, recall and F1 over pairs, in [0, 1], of ROUGE-1, 2, 3, L, S and W (Lin 2004).

    Args:
      predictions: the texts to score.
      references: one for each prediction.

    Returns:
      {"rouge1": {"precision", "recall", "f1"}, "rouge2": ..., "rouge3", "rougeL", "rougeS", "rougeW"}.

    Raises:
      ValueError: the lists have different lengths, or are empty.
    """
    sums = RougeSums()
    for prediction, reference in zip(predictions, references, strict=True):
        sums.add(prediction, reference)
    return sums.result()


class _UnicodeTokenizer:
    """The tokenizer of the module's docstring, as rouge-score calls it."""

    def tokenize(self, text: str) -> list[str]:
        characters = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
        return "".join(characters).split()


_TOKENIZER = _UnicodeTokenizer()


@functools.lru_cache(maxsize=1)
def _scorer() -> Any:
    """Returns the scorer of the library, which is slow to import (nltk) and not needed to answer questions."""
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(_LIBRARY_TYPES, tokenizer=_TOKENIZER)


@functools.lru_cache(maxsize=4096)  # a validation set of one-word answers has few different pairs
def _score_pair(prediction: str, reference: str) -> np.ndarray:
    """Returns the scores of one pair, [6, 3]: rows ROUGE_TYPES, columns precision, recall, F1."""
    library = _scorer().score(reference, prediction)
    words = _TOKENIZER.tokenize(prediction), _TOKENIZER.tokenize(reference)
    scores = [library[name][:2] for name in _LIBRARY_TYPES]
    scores += [_skip_bigrams(*words), _weighted_subsequence(*words, _WEIGHT)]
    rows = np.array([(p, r, 2 * p * r / (p + r) if p + r else 0.0) for p, r in scores])
    rows.flags.writeable = False  # the cache returns the same array to every caller
    return rows


def _skip_bigrams(prediction: list[str], reference: list[str]) -> tuple[float, float]:
    """Returns precision and recall of ROUGE-S, Lin 2004 equations 16 and 17."""
    predicted, expected = (
        Counter((first, second) for i, first in enumerate(words) for second in words[i + 1 :])
        for words in (prediction, reference)
    )
    common = (predicted & expected).total()
    return common / max(predicted.total(), 1), common / max(expected.total(), 1)


def _weighted_subsequence(prediction: list[str], reference: list[str], weight: float) -> tuple[float, float]:
    """Returns precision and recall of ROUGE-W, f(k) = k^weight; Lin 2004, equations 13 and 14 and their recursion."""
    if not prediction or not reference:
        return 0.0, 0.0
    scores = [0.0] * (len(reference) + 1)  # best weighted length so far, of the previous row of the table
    runs = [0] * (len(reference) + 1)  # consecutive matches that end here
    for word in prediction:
        new_scores, new_runs = [0.0], [0]
        for j, other in enumerate(reference, start=1):
            run = runs[j - 1] + 1 if word == other else 0
            new_runs.append(run)
            if run:
                new_scores.append(scores[j - 1] + run**weight - (run - 1) ** weight)
            else:
                new_scores.append(max(scores[j], new_scores[j - 1]))
        scores, runs = new_scores, new_runs
    best = scores[-1] ** (1 / weight)  # f^-1(a / b) = f^-1(a) / f^-1(b) for a power
    return best / len(prediction), best / len(reference)
