"""Evaluation: the same answers whatever the batch, the cache, the devices and their memory."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.data.records import Record
from paligemma_jax.data.synthetic_clevr.attributes import ANSWERS
from paligemma_jax.tasks.vqa import evaluation as vqa_evaluation
from paligemma_jax.tasks.vqa.evaluation import candidate_answers
from paligemma_jax.tasks.vqa.features import FeatureCache, QuestionReader, other_images
from tests.paligemma_jax.mini import ROOT, Rows, task_of
from tests.placed_model import placed_model
from train_jax.core.errors import UserError
from train_jax.system import memory
from train_jax.system.memory import step_memory

pytestmark = pytest.mark.usefixtures("fast_compilation")

ALL = ("generate", "likelihood", "loss")


@pytest.fixture(scope="module")
def options(mini_options):
    return mini_options | {"eval.batch_size": 13, "eval.max_new_tokens": 3, "eval.candidates": "clevr"}


@pytest.fixture(scope="module")
def answer(options):
    """Answers the rows by an evaluation with other settings."""

    def answers(rows, outputs=ALL, shuffled=False, **changes):
        task = task_of(options | {key.replace("__", "."): value for key, value in changes.items()})
        return list(task.evaluation(task.base()).answers(rows, outputs, shuffled))

    return answers


@pytest.fixture(scope="module")
def expected(answer, mini_rows):
    return answer(mini_rows)


def assert_same(answers, expected):
    for one, other in zip(answers, expected, strict=True):
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-4)
        assert dataclasses.replace(one, nll=0.0) == dataclasses.replace(other, nll=0.0)


def test_answers_belong_to_their_rows(expected, mini_rows):
    assert [one.image_name for one in expected] == [record.image_name for record in mini_rows.records]
    assert [one.reference for one in expected] == [record.suffix for record in mini_rows.records]
    assert [f"answer en {one.question}" for one in expected] == [record.prefix for record in mini_rows.records]
    assert {one.family for one in expected} == {"count", "query_color", "exist"}
    assert len({one.prediction for one in expected}) > 3  # not one answer for all
    assert all(one.tokens == 2 for one in expected if one.reference in ("2", "red", "yes"))


def test_an_answer_has_its_image_and_whether_it_ended(answer, expected, mini_rows):
    """An answer that ends has EOS among its tokens; with room for one token, only the empty answer does."""
    assert [one.image_index for one in expected] == [record.image_index for record in mini_rows.records]
    short = answer(mini_rows, ("generate", "loss"), eval__max_new_tokens=1)
    assert all(one.ended is (one.prediction == "") for one in short)


@pytest.mark.parametrize("changes", [{"eval__batch_size": 1}, {"eval__batch_size": 5}, {"eval__feature_cache_mb": 0}])
def test_batch_and_cache_change_nothing(answer, expected, mini_rows, changes):
    assert_same(answer(mini_rows, **changes), expected)


def test_loss_chunks_change_nothing(answer, expected, mini_rows):
    assert_same(answer(mini_rows, loss__chunk_size=7, loss__vocab_chunk=100), expected)


@pytest.mark.parametrize("mesh", [{"mesh__data": 8}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}])
def test_devices_change_nothing(options, expected, mini_rows, mesh):
    task = task_of(options | {key.replace("__", "."): value for key, value in mesh.items()})
    model = placed_model(task).model()
    assert_same(list(task.evaluation(model).answers(mini_rows, ALL)), expected)


def test_the_likeliest_candidate(options, expected, mini_rows):
    """Scoring all candidates at once equals the token loss of each as the row's own answer."""
    task = task_of(options)
    losses = []
    for candidate in ANSWERS:
        rows = [task.processor.text(dataclasses.replace(record, suffix=candidate)) for record in mini_rows.records]
        images = np.stack([task.processor.image(record)["image"] for record in mini_rows.records])
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"image": images}
        losses.append(_loss(task, task.base(), batch))
    losses = np.stack(losses)
    assert [one.likeliest for one in expected] == [ANSWERS[i] for i in losses.argmin(axis=0)]
    right = [ANSWERS.index(record.suffix) for record in mini_rows.records]
    np.testing.assert_allclose([one.nll for one in expected], losses[right, np.arange(13)], rtol=1e-4)


def _loss(task, model, batch):
    return np.asarray(task._compiled_token_loss(model, batch)[0])


def test_candidates():
    assert candidate_answers("clevr") == ANSWERS and len(ANSWERS) == 28
    assert candidate_answers("a b|c") == ("a b", "c")
    assert candidate_answers("") == ()


def test_no_candidates(answer, mini_rows):
    assert {one.likeliest for one in answer(mini_rows, ("likelihood",), eval__candidates="")} == {None}


# Memory


class OutOfMemory:
    """Stands for a computation on a device that holds at most `limit` rows."""

    def __init__(self, function, limit):
        self.function, self.limit, self.failed = function, limit, []

    def __call__(self, model, images, prompt, *args, **options):
        if len(prompt) > self.limit:
            self.failed.append(len(prompt))
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return self.function(model, images, prompt, *args, **options)


def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, answer, expected, mini_rows, caplog):
    small = OutOfMemory(vqa_evaluation.generate, 3)
    monkeypatch.setattr(vqa_evaluation, "generate", small)
    assert_same(answer(mini_rows), expected)
    assert small.failed == [13, 6]
    assert "Evaluation continues with batches of 3 questions: the device ran out of memory" in caplog.text


def test_not_even_one_row_fits(monkeypatch, answer, mini_rows):
    monkeypatch.setattr(vqa_evaluation, "generate", OutOfMemory(vqa_evaluation.generate, 0))
    with pytest.raises(UserError, match="1 example.s. at once does not fit the device's memory"):
        answer(mini_rows)


def test_other_device_errors_pass_through(monkeypatch, answer, mini_rows):
    def broken(*args, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    monkeypatch.setattr(vqa_evaluation, "generate", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        answer(mini_rows)


def test_the_batch_is_fitted_to_the_devices_memory(monkeypatch, options, expected, mini_rows):
    """It is the largest of 8, 4, 2, 1 whose compiled computations need no more than is free."""
    compiled = []

    def step_memory_of(step):
        real = step_memory(step)
        assert real.temp > 0
        compiled.append(step)
        return real._replace(temp=8000 >> (len(compiled) - 1), output=0)

    monkeypatch.setattr(vqa_evaluation, "step_memory", step_memory_of)
    monkeypatch.setattr(vqa_evaluation, "device_memory_limit", lambda: 4000)
    task = task_of(options | {"eval.batch_size": 8})
    evaluation = task.evaluation(task.base())
    assert_same(list(evaluation.answers(mini_rows, ALL)), expected)
    assert evaluation._limit == 4 and len(compiled) == 2
    list(evaluation.answers(mini_rows, ("generate",), shuffled=True))
    assert len(compiled) == 2  # once an evaluation
    again = task.evaluation(task.base())
    assert_same(list(again.answers(mini_rows, ALL)), expected)
    assert again._limit == 4 and len(compiled) == 2  # and a run evaluates many times


def planned(evaluation, rows, size, outputs=ALL):
    """Bytes that the compiler plans for one batch, beside the model and the inputs."""
    with QuestionReader(evaluation.processor, rows, lambda images: images, size, 0, False) as reader:
        batch, images = evaluation._shapes(reader, size)
    step = jax.jit(evaluation._everything, static_argnums=3).lower(evaluation.model, batch, images, outputs).compile()
    memory = step_memory(step)
    return memory.temp + memory.output


@pytest.mark.parametrize("size, changes", [(64, {}), (2, {"data.prefix_length": 200, "eval.candidates": ""})])
def test_all_activations_are_more_than_any_compiler_plans(options, mini_rows, size, changes):
    task = task_of(options | changes)
    evaluation = task.evaluation(task.base())
    assert planned(evaluation, mini_rows, size) < evaluation._all_activations(size)


def test_on_a_cpu_the_batch_is_fitted_to_the_hosts_memory(monkeypatch, options, expected, mini_rows, caplog):
    """One byte too little for the 13 rows that there are, whatever the batch size of the config."""
    task = task_of(options | {"eval.batch_size": 100_000})
    evaluation = task.evaluation(task.base())
    need = planned(evaluation, mini_rows, len(mini_rows), ("generate",))
    left = -(-(need - 1) * 8 * 4 // 3)  # 8 devices share three quarters of it
    monkeypatch.setattr(memory, "host_memory_left", lambda: left)
    assert memory.device_memory_limit() == need - 1
    predictions = [one.prediction for one in evaluation.answers(mini_rows, ("generate",))]
    assert predictions == [one.prediction for one in expected]
    assert evaluation._limit == 6
    assert f"with batches of 6 questions: more need {need} bytes beside the model, {need - 1} are free" in caplog.text


SCRIPT = """
import itertools, json, sys
import numpy as np
from tests.paligemma_jax.mini import Rows, png, task_of
from paligemma_jax.data.records import Record
from train_jax.system.memory import peak_memory_bytes

class Many(Rows):
    def __init__(self, count):
        self.count, self.images = count, [png(i) for i in range(8)]
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        name = f"{i // 4}.png"
        return Record(self.images[i // 4 % 8], name, i // 4, "answer en Is there a red cube?", "yes")
    def image_numbers(self):
        return np.arange(self.count) // 4

options, count = json.loads(sys.argv[1]), int(sys.argv[2])
task = task_of(options)
evaluation = task.evaluation(task.base())
answered = sum(1 for _ in evaluation.answers(Many(count), ("generate", "likelihood", "loss")))
assert answered == count
print(peak_memory_bytes().process)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_questions(options):
    peaks = []
    options = options | {"eval.batch_size": 50, "eval.feature_cache_mb": 1, "eval.max_new_tokens": 2}
    for count in (500, 2000):
        command = [sys.executable, "-c", SCRIPT, json.dumps(options), str(count)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 50 * 2**20


# Images


@pytest.fixture
def reader(options):
    """Makes a reader whose features are the pixels themselves."""

    def make(rows, size, shuffled=False, **changes):
        task = task_of(options | {key.replace("__", "."): value for key, value in changes.items()})
        cache_bytes = task.config.eval.feature_cache_mb << 20
        encode = lambda images: images.astype(np.float32)  # noqa: E731
        return QuestionReader(task.processor, rows, encode, size, cache_bytes, shuffled)

    return make


def pixels(task, record):
    return task.processor.image(record)["image"].astype(np.float32)


def test_the_last_batch_is_padded_with_weight_zero(reader, mini_rows):
    records, batch = reader(mini_rows, 8).read(range(8, 13), 8)
    assert records == mini_rows.records[8:]
    assert batch["weight"].tolist() == [1] * 5 + [0] * 3
    assert {len(array) for array in batch.values()} == {8}


def test_every_question_is_shown_its_own_image(reader, mini_rows, options):
    _, batch = reader(mini_rows, 13).read(range(13), 13)
    task = task_of(options)
    np.testing.assert_array_equal(batch["features"], [pixels(task, record) for record in mini_rows.records])


def test_shuffled_no_question_is_shown_its_own_image(reader, mini_rows, options):
    _, batch = reader(mini_rows, 13, shuffled=True).read(range(13), 13)
    task = task_of(options)
    own = {record.image_index: pixels(task, record) for record in mini_rows.records}
    shown = [next(key for key, image in own.items() if np.array_equal(image, row)) for row in batch["features"]]
    pairs = dict(zip(mini_rows.image_numbers().tolist(), shown, strict=True))
    assert [pairs[number] for number in mini_rows.image_numbers()] == shown  # one image for all questions on an image
    assert all(number != other for number, other in pairs.items())
    assert sorted(pairs.values()) == sorted(pairs)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_cycle_of_images(count):
    numbers = np.arange(count) * 3
    after = other_images(numbers)
    seen, at = [], 0
    for _ in range(count):
        seen.append(at)
        at = after[at]
    assert at == 0 and sorted(seen) == numbers.tolist()


def test_a_question_only_run_sees_black(options, mini_rows):
    task = task_of(options | {"data.blank_images": True})
    assert not any(task.processor.image(record)["image"].any() for record in mini_rows.records)
    assert any(task_of(options).processor.image(record)["image"].any() for record in mini_rows.records)


# Bad rows


def broken_rows(mini_rows):
    """One unreadable image with three questions, and one question that does not fit."""
    records = list(mini_rows.records)
    records[3:6] = [dataclasses.replace(record, image=b"broken") for record in records[3:6]]
    records[9] = dataclasses.replace(records[9], prefix="answer en " + "red " * 100)
    return Rows(records)


def test_bad_rows_are_left_out_and_change_no_other(answer, expected, mini_rows, caplog):
    rows = broken_rows(mini_rows)
    answers = answer(rows, data__max_bad_fraction=0.5, data__on_truncation="skip", eval__batch_size=4)
    assert_same(answers, [one for i, one in enumerate(expected) if i not in (3, 4, 5, 9)])
    assert "1.png" in caplog.text and "The prefix with BOS and separator has" in caplog.text


def test_too_many_bad_rows_end_the_evaluation(answer, mini_rows):
    with pytest.raises(UserError, match=r"4 of 13 rows read were bad \(30.8%; first: 1.png, 1.png, 1.png\)"):
        answer(broken_rows(mini_rows), data__max_bad_fraction=0.3, data__on_truncation="skip")
    assert len(answer(broken_rows(mini_rows), data__max_bad_fraction=0.31, data__on_truncation="skip")) == 9


def test_a_bad_row_stops_where_the_config_says_so(answer, mini_rows):
    with pytest.raises(UserError, match="1.png: cannot decode the image"):
        answer(broken_rows(mini_rows), data__on_error="raise", data__on_truncation="skip")
    with pytest.raises(UserError, match="The prefix with BOS and separator has .* tokens but 56 fit"):
        answer(broken_rows(mini_rows), data__max_bad_fraction=1.0)


def test_no_good_row(answer):
    rows = Rows([Record(b"", "a.png", 0, "answer en x", "y")])
    with pytest.raises(UserError, match="none of the 1 rows to evaluate can be used"):
        answer(rows, data__max_bad_fraction=1.0)


# The cache


def test_the_cache_encodes_an_image_once_and_stays_small():
    encoded, fetched = [], []

    def encode(images):
        encoded.append(len(images))
        return images * 2.0

    def fetch(keys):
        fetched.extend(keys)
        return [np.full((2, 3), key, np.float32) for key in keys]

    cache = FeatureCache(encode, batch_size=4, max_bytes=3 * 2 * 3 * 4)
    features = cache.get([5, 1, 5, 2, 1], fetch)
    np.testing.assert_array_equal(features[:, 0, 0], [10, 2, 10, 4, 2])
    assert fetched == [5, 1, 2] and encoded == [4]
    np.testing.assert_array_equal(cache.get([2, 5], fetch)[:, 0, 0], [4, 10])
    assert fetched == [5, 1, 2]
    cache.get([9], fetch)  # the fourth: 1 was used longest ago
    assert cache._features.currsize == 3 * 2 * 3 * 4
    cache.get([2, 5, 9], fetch)
    assert fetched == [5, 1, 2, 9]
    np.testing.assert_array_equal(cache.get(list(range(20, 30)), fetch)[:, 1, 2], 2.0 * np.arange(20, 30))
    assert encoded[-3:] == [4, 4, 4] and cache._features.currsize <= 3 * 2 * 3 * 4


def test_a_cache_smaller_than_one_image_keeps_nothing():
    fetched = []

    def fetch(keys):
        fetched.extend(keys)
        return [np.full((2, 3), key, np.float32) for key in keys]

    for max_bytes in (0, 2 * 3 * 4 - 1):
        cache = FeatureCache(lambda images: images * 2.0, batch_size=2, max_bytes=max_bytes)
        for _ in range(2):
            np.testing.assert_array_equal(cache.get([7, 7], fetch)[:, 0, 0], [14, 14])
        assert cache._features.currsize == 0
    assert fetched == [7] * 4


def test_features_are_those_of_the_tower(options, mini_rows):
    from paligemma_jax.tasks.vqa.features import encode_images

    task = task_of(options)
    model = task.base()
    images = np.stack([task.processor.image(record)["image"] for record in mini_rows.records[:4]])
    prepared = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    expected, _ = nnx.jit(lambda model, x: model.encode_image(x))(model, prepared)
    np.testing.assert_allclose(encode_images(model, images), expected, atol=1e-5)
