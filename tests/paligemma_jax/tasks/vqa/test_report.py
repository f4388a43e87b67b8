"""The report: controls by hand, and what stands in the files."""

import dataclasses
import io

import matplotlib.axes
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.data.records import Record
from paligemma_jax.metrics.text import Accuracy, rouge
from paligemma_jax.tasks.vqa import figures
from paligemma_jax.tasks.vqa import report as vqa_report
from paligemma_jax.tasks.vqa.answer_record import Answer, question_of
from paligemma_jax.tasks.vqa.figures import save_answer_sheet
from tests.paligemma_jax.mini import Rows, png, read_lines, task_of
from train_jax.core import param_tree

COUNT, COLOR = "How many cubes are there?", "What color is the cube?"


def answer(question, reference, prediction="", likeliest=None, image="0.png", nll=1.0, tokens=2.0):
    family = {COUNT: "count", COLOR: "query_color"}[question]
    return Answer(image, question, family, reference, prediction, likeliest, nll, tokens)


PROMPT = "answer en {question}"


def test_question_of():
    assert question_of("answer en Why?", "answer en {question}") == "Why?"
    assert question_of("Q: Why? A:", "Q: {question} A:") == "Why?"
    assert question_of("caption en", "answer en {question}") == "caption en"


def test_the_most_frequent_training_answer_of_a_family():
    class Faulty(Rows):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("unreadable")
            return super().__getitem__(index)

    texts = [(COUNT, "9"), (COUNT, "2"), (COUNT, "3"), (COUNT, "2"), (COLOR, "red"), (COLOR, "blue"), (COLOR, "blue")]
    train = Faulty([Record(b"", "x.png", i, f"answer en {q}", a) for i, (q, a) in enumerate(texts)])
    frequent = vqa_report.MajorityBaseline(train, PROMPT)
    assert frequent.guesses == {"count": "2", "query_color": "blue"}
    for one in (answer(COUNT, "2"), answer(COUNT, "9"), answer(COLOR, "blue"), answer(COLOR, "red")):
        frequent.add(one)
    frequent.add(dataclasses.replace(answer(COUNT, ""), family="exist", reference="yes"))  # never trained
    assert frequent.accuracy.overall == 2 / 5
    assert frequent.accuracy.by_family() == {"count": 0.5, "exist": 0.0, "query_color": 0.5}


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_faults_of_the_program_are_not_taken_for_bad_rows(error):
    """Bad rows raise UserError or OSError; anything else passes through, in the counts and on the sheet."""

    class Broken(Rows):
        def __getitem__(self, index):
            raise error("a fault")

    rows = Broken([Record(b"", "x.png", 0, "answer en Why?", "1")])
    with pytest.raises(error, match="a fault"):
        vqa_report.MajorityBaseline(rows, PROMPT)
    with pytest.raises(error, match="a fault"):
        figures._images(rows, {"x.png"})


def test_the_best_of_the_controls():
    shuffled = Accuracy()
    for right in (True, False, False, False):
        shuffled.add(right, "count")
    blank = {"accuracy": 0.5, "accuracy_by_family": {"count": 0.5}, "loss": 1.0}
    result = vqa_report._best_control(
        {"accuracy_shuffled": shuffled, "accuracy_question_only": blank, "accuracy_x": None}
    )
    assert result == {
        "accuracy_blind": 0.5,
        "accuracy_shuffled": 0.25,
        "accuracy_question_only": 0.5,
        "accuracy_x": None,
        "controls_by_family": {"accuracy_shuffled": {"count": 0.25}, "accuracy_question_only": {"count": 0.5}},
    }


def test_scores_by_hand():
    answers = [
        answer(COUNT, "2", "2", "3", nll=1.0, tokens=2.0),
        answer(COUNT, "3", "2", "3", nll=4.0, tokens=2.0),
        answer(COLOR, "red", " red ", "red", nll=1.0, tokens=4.0, image="1.png"),
    ]
    written = []
    results, shown = vqa_report._score(answers, written.append, None)
    assert written == answers
    assert shown == [answers[0], answers[2]]  # one an image
    assert results["examples"] == 3
    assert results["loss"] == 6.0 / 8.0
    assert results["accuracy"] == results["accuracy_likelihood"] == 2 / 3
    assert results["accuracy_by_family"] == {"count": 0.5, "query_color": 1.0}
    assert results["examples_by_family"] == {"count": 2, "query_color": 1}
    expected = rouge([a.prediction for a in answers], [a.reference for a in answers])
    assert results["rouge"] == expected and results["rougeL"] == expected["rougeL"]["f1"] == pytest.approx(2 / 3)


def test_the_file_of_predictions_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "run" / "predictions.jsonl"
    with pytest.raises(RuntimeError), vqa_report._writer(file) as write:
        write(answer(COUNT, "2", "2"))
        raise RuntimeError("cut off")
    assert not file.exists()
    with vqa_report._writer(file) as write:
        write(answer(COUNT, "2", "2"))
        write(answer(COLOR, "röt", "blue", nll=float("nan")))
    rows = read_lines(file)
    assert [(row["reference"], row["correct"]) for row in rows] == [("2", True), ("röt", False)]
    assert [row["nll"] for row in rows] == [1.0, None]  # JSON has no NaN
    assert rows[0].keys() >= {"image_name", "question", "family", "prediction", "likeliest", "nll", "tokens"}


def test_the_sheet_shows_the_scenes_of_the_answers(tmp_path, monkeypatch):
    shown_images = []
    source = Rows([Record(png(i), f"{i}.png", i, COUNT, "2") for i in range(4)])
    source.records[0] = dataclasses.replace(source.records[0], image=b"broken")
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda axis, picture, **options: shown_images.append(picture))
    answers = [answer(COUNT, "2", said, image=f"{i}.png") for i, said in ((3, "2"), (1, "$x_ costs $"))]
    save_answer_sheet(source, answers, tmp_path / "scenes.png", view_ratio=1.5)
    assert [np.asarray(picture)[0, 0].tolist() for picture in shown_images] == [
        np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)[0, 0].tolist() for i in (3, 1)
    ]
    with Image.open(tmp_path / "scenes.png") as sheet:
        assert sheet.width > 300


def test_the_sheet_distinguishes_images_of_the_same_name(tmp_path, monkeypatch):
    shown_images = []
    source = Rows([Record(png(i), "0001.png", i, COUNT, "2") for i in range(3)])
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda axis, picture, **options: shown_images.append(picture))
    answers = [dataclasses.replace(answer(COUNT, "2", "2", image="0001.png"), image_index=i) for i in (0, 1, 1, 2)]
    _, shown = vqa_report._score(answers, lambda answer: None, None)
    assert [one.image_index for one in shown] == [0, 1, 2]
    save_answer_sheet(source, shown[::-1], tmp_path / "scenes.png")
    firsts = [np.asarray(picture)[0, 0].tolist() for picture in shown_images]
    assert firsts == [np.asarray(Image.open(io.BytesIO(png(i))))[0, 0].tolist() for i in (2, 1, 0)]


def test_the_share_of_answers_that_were_cut():
    ended = [dataclasses.replace(answer(COUNT, "2", "2"), ended=value) for value in (True, False, True, True)]
    assert vqa_report._score(ended, lambda answer: None, None)[0]["answers_without_eos"] == 0.25


@pytest.mark.usefixtures("fast_compilation")
def test_the_model_before_training(mini_options, mini_run):
    """It is the base, which shares the run's frozen arrays."""
    task = task_of(mini_options)
    trained = pg.load(mini_run)
    before = param_tree.flatten(task._initial_model(trained))
    base, after = param_tree.flatten(task.base()), param_tree.flatten(trained)
    assert before.keys() == base.keys() < after.keys()
    for path, array in base.items():
        np.testing.assert_array_equal(before[path], array, err_msg=path)
        assert before[path].unsafe_buffer_pointer() == after[path].unsafe_buffer_pointer()
    changed = task_of(mini_options | {"adapter.name": "none", "cache_features": False})
    spoiled = nnx.clone(changed.base())
    spoiled.projector.linear.kernel[...] *= 0
    again = param_tree.flatten(changed._initial_model(spoiled))
    np.testing.assert_array_equal(again["projector/linear/kernel"], base["projector/linear/kernel"])
