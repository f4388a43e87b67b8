"""ROUGE against Lin's worked examples, hand-computed values and the rouge-score library; accuracy by family."""

import numpy as np
import pytest
from rouge_score import rouge_scorer

from paligemma_jax.metrics.text import Accuracy, RougeSums, _weighted_subsequence, exact_match, rouge

GUNMAN = "police killed the gunman"


def f1(name, prediction, reference):
    return rouge([prediction], [reference])[name]["f1"]


@pytest.mark.parametrize(
    ("candidate", "skip_bigram", "subsequence"),
    [
        ("police kill the gunman", 3 / 6, 3 / 4),
        ("the gunman kill police", 1 / 6, 2 / 4),
        ("the gunman police killed", 2 / 6, 2 / 4),
    ],
)
def test_lins_sentences(candidate, skip_bigram, subsequence):
    """Lin 2004, sections 3.1 and 4: S2, S3 and S4 against S1."""
    assert f1("rougeS", candidate, GUNMAN) == pytest.approx(skip_bigram)
    assert f1("rougeL", candidate, GUNMAN) == pytest.approx(subsequence)


def test_lins_weighted_subsequences():
    """Lin 2004, section 3.3: with f(k) = k^2 the consecutive match scores 0.571 and the scattered one 0.286."""
    reference = list("ABCDEFG")
    assert _weighted_subsequence(list("ABCDHIK"), reference, 2.0) == pytest.approx((4 / 7, 4 / 7))
    assert _weighted_subsequence(list("AHBKCID"), reference, 2.0) == pytest.approx((2 / 7, 2 / 7))


def test_weighted_subsequence_by_hand():
    """Runs of 2 and 1 match: (2^1.2 + 1)^(1/1.2) of 4 and 3 words."""
    got = rouge(["a big red cube"], ["a big cube"])["rougeW"]
    best = (2**1.2 + 1) ** (1 / 1.2)
    precision, recall = best / 4, best / 3
    assert got["precision"] == pytest.approx(precision) and got["recall"] == pytest.approx(recall)
    assert got["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_weight_one_is_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (" ".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(2))
        expected = rouge([a], [b])["rougeL"]
        got = _weighted_subsequence(a.split(), b.split(), 1.0)
        assert got == pytest.approx((expected["precision"], expected["recall"]))


def test_repeated_skip_bigrams_are_clipped():
    """ "a a a" has the pair (a, a) three times, "a a" once."""
    got = rouge(["a a a"], ["a a"])["rougeS"]
    assert got == {"precision": pytest.approx(1 / 3), "recall": 1.0, "f1": pytest.approx(0.5)}


def test_equal_to_the_library_on_ascii():
    rng = np.random.default_rng(1)
    words = ["The", "red", "cube,", "is", "left_of", "the", "2", "spheres!", "it's"]
    predictions, references = ([" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(60)] for _ in range(2))
    got = rouge(predictions, references)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rouge3", "rougeL"])
    scores = [scorer.score(target=r, prediction=p) for p, r in zip(predictions, references, strict=True)]
    for name in scorer.rouge_types:
        means = np.mean([score[name] for score in scores], axis=0)
        assert [got[name][key] for key in ("precision", "recall", "f1")] == pytest.approx(means)


def test_other_scripts():
    for text in ("два красных куба", "三个 红色 球体", "दो लाल घन", "ثلاثة مكعبات حمراء"):
        scores = rouge([text], [text])
        assert all(
            scores[name]["f1"] == pytest.approx(1.0) for name in ("rouge1", "rouge2", "rouge3", "rougeL", "rougeW")
        )
    assert f1("rouge1", "синий куб", "красный куб") == pytest.approx(0.5)
    assert f1("rouge1", "हिन्दी", "हिन्द") == 0.0  # a vowel sign is part of its word


def test_empty_and_single_words():
    for prediction, reference in (("", "red cube"), ("red cube", ""), ("", ""), ("?!", "red")):
        assert not any(value for score in rouge([prediction], [reference]).values() for value in score.values())
    one = rouge(["Red."], ["red"])
    assert {name: score["f1"] for name, score in one.items()} == {
        "rouge1": 1.0,
        "rouge2": 0.0,
        "rouge3": 0.0,
        "rougeL": 1.0,
        "rougeS": 0.0,
        "rougeW": 1.0,
    }


def test_stream_is_the_mean_over_pairs():
    predictions, references = ["red", "a red cube", "no"] * 5, ["red", "a blue cube", "yes"] * 5
    sums = RougeSums()
    for pair in zip(predictions, references, strict=True):
        sums.add(*pair)
    assert sums.result() == rouge(predictions, references)
    singles = [f1("rouge1", p, r) for p, r in zip(predictions, references, strict=True)]
    assert sums.result()["rouge1"]["f1"] == pytest.approx(np.mean(singles)) == pytest.approx((1 + 2 / 3 + 0) / 3)
    with pytest.raises(ValueError):
        RougeSums().result()
    with pytest.raises(ValueError):
        rouge(["a"], [])


def test_exact_match():
    assert exact_match(" yes\n", "yes") and exact_match("", " ")
    assert not exact_match("Yes", "yes") and not exact_match("2 red", "2  red")


def test_accuracy_by_family():
    accuracy = Accuracy()
    for correct, family in ((True, "exist"), (False, "count"), (True, "count"), (False, "count")):
        accuracy.add(correct, family)
    assert accuracy.examples == 4 and accuracy.overall == 0.5
    assert accuracy.by_family() == {"count": pytest.approx(1 / 3), "exist": 1.0}
