"""Runs on some families of questions: which rows train, captions of the same scenes, and what the report tells."""

import json
import math

import numpy as np
import pytest

from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.data.sources.scene_captions import SceneCaptions
from paligemma_jax.data.synthetic_clevr.build import split_scene
from paligemma_jax.tasks.vqa.answer_record import question_of
from paligemma_jax.tasks.vqa.forgetting import changes
from tests.paligemma_jax.mini import Rows, mistake, task_of, train_main

pytestmark = pytest.mark.usefixtures("fast_compilation")
TUNED = ("exist", "count")
FAMILIES = {"data.families": TUNED, "data.tune_fraction": 0.5}


def families(source, prompt: str) -> set[str]:
    return {question_family(question_of(source[i].prefix, prompt)) for i in range(len(source))}


def test_only_these_families_train_and_all_are_reported(mini_options):
    task, whole = task_of(mini_options | FAMILIES), task_of(mini_options)
    prompt = task.config.data.prompt
    for name in ("train", "tune"):
        assert families(task.split(name), prompt) <= set(TUNED) and len(task.split(name))
    expected = sum(
        families([record], prompt) <= set(TUNED) for name in ("train", "tune") for record in whole.split(name)
    )
    assert expected == len(task.split("train")) + len(task.split("tune"))
    assert task.split("validation").fingerprint == whole.split("validation").fingerprint
    assert task.split("train").fingerprint != whole.split("train").fingerprint


def test_unreadable_rows_are_kept(mini_options, mini_rows):
    from paligemma_jax.tasks.vqa.forgetting import filter_by_family

    class Torn(Rows):
        def __getitem__(self, index):
            if index == 4:
                raise OSError("torn")
            return super().__getitem__(index)

    data = task_of(mini_options | {"data.families": ("query_color",)}).config.data
    assert filter_by_family(Torn(mini_rows.records), data).indices.tolist() == [1, 4, 7, 10]


def test_captions_are_of_the_scene_in_the_picture(mini_options):
    source = task_of(mini_options).split("validation")
    captions = SceneCaptions(source, 0, 3)
    assert len(captions) == 3 and len(set(captions.image_numbers().tolist())) == 3
    numbers = source.image_numbers()
    for record, number in zip(captions, captions.image_numbers(), strict=True):
        shown = source[int(np.flatnonzero(numbers == number)[0])]
        assert (record.image, record.image_name, record.prefix) == (shown.image, shown.image_name, "caption en")
        objects = split_scene(0, "val", int(record.image_name[-10:-4]))["objects"]
        assert record.suffix.startswith(f"{len(objects)} objects: ")
        for item in objects:
            assert f"{item['size']} {item['color']} {item['material']} {item['shape']}" in record.suffix
    assert SceneCaptions(source, 0, 2).fingerprint != captions.fingerprint


def test_families_have_equal_weight():
    results = {
        "accuracy_likelihood_by_family": {"count": 0.9, "exist": 0.5, "query_size": 0.25},
        "accuracy_before_by_family": {"count": 0.5, "exist": 0.75, "query_size": 0.75},
    }
    result = changes(("count",), results)
    assert result == {"accuracy_tuned": 0.9, "change_tuned": pytest.approx(0.4), "accuracy_untuned": 0.375,
                     "change_untuned": -0.375}  # fmt: skip
    del results["accuracy_before_by_family"]
    assert changes(("count",), results) == result | {"change_tuned": None, "change_untuned": None}


def test_a_run_reports_what_it_forgot(mini_options, tmp_path):
    short = {"total_steps": 2, "eval_steps": 2, "checkpoint_steps": 2, "log_steps": 1, "eval.controls": False}
    train_main(tmp_path, mini_options | FAMILIES | short | {"eval.captions": 2, "consistency.weight": 0.5})
    results = json.loads((tmp_path / "eval.json").read_text())
    after, before = (results[f"accuracy_{name}_by_family"] for name in ("likelihood", "before"))
    assert after.keys() == before.keys() and not after.keys() <= set(TUNED)
    gains = [after[name] - before[name] for name in after if name not in TUNED]
    assert results["change_untuned"] == pytest.approx(sum(gains) / len(gains))
    assert results["change_captions"] == pytest.approx(results["caption_loss"] - results["caption_loss_before"])
    assert 0 < results["caption_loss_before"] < math.inf and results["change_captions"] != 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("consistency_answers" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data.families": ("colour",)}, "config.data.families holds 'colour', expected some of exist, count, "
         "equal_integer, less_than, greater_than, query_size, query_color, query_material, query_shape, equal_size, "
         "equal_color, equal_material, equal_shape: change it"),
        ({"data.name": "jsonl", "eval.captions": 5}, "eval.captions is 5 beside data.name='jsonl', expected 0, as only "
         "the scenes of synthetic_clevr have captions: change it."),
        ({"eval.captions": -1}, "config.eval.captions=-1, expected 0 or more: change it"),
        ({"data.families": ("equal_shape",), "data.num_train_scenes": 2, "data.questions_per_scene": 1},
         "data.families is ('equal_shape',) but none of the 2 training questions is of these, expected some: choose "
         "other families."),
    ],
)  # fmt: skip
def test_mistakes(mini_options, tmp_path, capsys, options, sentence):
    assert mistake(capsys, mini_options | options, tmp_path / "run") == sentence
