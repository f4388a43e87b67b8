"""A warning before training about references that do not fit into an answer."""

import pytest

from paligemma_jax.data.records import BadRow, Record
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.tasks.vqa.rows import warn_of_cut_references
from paligemma_jax.tasks.vqa.task import VQA
from tests.paligemma_jax.mini import Rows, task_of

TINY = load_tokenizer("tiny")


def rows(*texts):
    return Rows([Record(b"", "x.png", 0, "answer en What?", text) for text in texts])


def test_the_warning_has_the_longest_reference_and_their_number(caplog):
    texts = ["red", "two red cubes", "two red cubes", "two red cubes and a ball " * 20]
    lengths = [len(TINY.encode(text)) for text in texts]
    warn_of_cut_references(TINY, rows(*texts), "validation", lengths[1] - 1)
    (line,) = caplog.messages
    assert "3 of 4 references of 'validation'" in line and f"The longest has {lengths[3]} tokens" in line
    assert f"eval.max_new_tokens={lengths[3] + 1} or more" in line and len(line) < 400


def test_references_that_fit_and_bad_rows_give_no_warning(caplog):
    class Faulty(Rows):
        def __getitem__(self, index):
            if index == 1:
                raise BadRow("broken")
            return super().__getitem__(index)

    source = Faulty(rows("red", "two red cubes", "blue").records)
    warn_of_cut_references(TINY, source, "validation", max(len(TINY.encode(text)) for text in ("red", "blue")))
    assert not caplog.messages


@pytest.mark.parametrize("max_new_tokens, splits", [(1, ["tune", "validation"]), (4, [])])
def test_a_run_warns_before_it_trains(mini_options, monkeypatch, caplog, max_new_tokens, splits):
    source = rows("red", "two red cubes")
    monkeypatch.setattr(VQA, "split", lambda task, name: source)
    task_of(mini_options | {"eval.max_new_tokens": max_new_tokens}).train_source()
    assert [name for name in ("train", "tune", "validation") if f"references of '{name}'" in caplog.text] == splits


@pytest.mark.parametrize("features", [False, True])
def test_training_records_are_opened_without_the_model(mini_options, monkeypatch, mini_rows, features):
    """Of the length and the fingerprint of what trains, by which a complete run is compared."""
    monkeypatch.setattr(VQA, "split", lambda task, name: mini_rows)
    trained = task_of(mini_options | {"cache_features": features}).train_source()
    task = task_of(mini_options)
    monkeypatch.setattr(VQA, "base", lambda task: pytest.fail("the model was read"))
    records = task.train_records()
    assert (len(records), records.fingerprint) == (len(trained), trained.fingerprint)
    assert task.reported_data() == mini_rows.fingerprint
