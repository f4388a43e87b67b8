import pytest
from ml_collections import ConfigDict

from train_jax.config.base import base_config
from train_jax.config.configurable import Configurable
from train_jax.config.resume_check import ABSENT, check_resume, difference
from train_jax.core.errors import UserError

TASK = f"{__name__}:Dummy"


class Dummy(Configurable):
    resume_safe_keys = (r"eval\.batch_size",)

    @staticmethod
    def defaults() -> ConfigDict:
        return ConfigDict({"eval": {"batch_size": 4, "split": "validation"}, "total_epochs": 1.0, "batch_size": 8})


def config(**changes):
    made = base_config(TASK)
    made.update_from_flattened_dict(changes)
    return made


def test_difference_lists_every_changed_key():
    old, new = config(seed=1), config(**{"eval.split": "test"})
    with new.unlocked():
        new.extra = 3
    assert sorted(difference(old, new)) == [
        ("eval.split", "validation", "test"),
        ("extra", ABSENT, 3),
        ("seed", 1, 0),
    ]
    assert difference(old, old) == []


def test_same_config_resumes_without_notes():
    assert check_resume(config(), config()) == []


@pytest.mark.parametrize(
    "key, value",
    [
        ("mesh.fsdp", 4),
        ("micro_batch", 2),
        ("data.workers", 3),
        ("data.threads", 3),
        ("log_steps", 3),
        ("eval_epochs", 3.0),
        ("checkpoint_percent", 0.5),
        ("max_bad_steps", 5),
        ("patience", 5),
        ("eval.batch_size", 64),  # the task's own
    ],
)
def test_keys_outside_the_mathematics_are_free(key, value):
    (note,) = check_resume(config(), config(**{key: value}))
    assert note.startswith(f"{key}: ") and note.endswith(f"-> {value!r} (does not change the mathematics)")


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1),
        ("batch_size", 16),
        ("optimizer.learning_rate", 0.5),
        ("eval.split", "test"),
        ("compute_dtype", "float16"),
    ],
)
def test_the_mathematics_may_not_change(key, value):
    old = config()
    with pytest.raises(UserError, match="the workdir holds a run with another config") as caught:
        check_resume(old, config(**{key: value, "log_steps": 7}))
    before = old
    for part in key.split("."):
        before = before[part]
    assert f"({key}: {before!r} -> {value!r})" in str(caught.value)  # and not log_steps
    assert "undo the change, or choose another --workdir" in str(caught.value)


def test_all_refused_keys_are_listed():
    with pytest.raises(UserError, match="seed: 0 -> 1; .*learning_rate: 0.001 -> 0.5|learning_rate.*; seed: 0 -> 1"):
        check_resume(config(), config(seed=1, **{"optimizer.learning_rate": 0.5}))


def test_longer_runs_extend_and_say_so():
    (note,) = check_resume(config(), config(total_epochs=2.0), epoch_examples=80)
    assert note == "the run is extended from 10 to 20 steps (total_epochs=1.0 -> total_epochs=2.0)"


@pytest.mark.parametrize("setting", [{"optimizer.schedule": "cosine"}, {"optimizer.warmup_percent": 0.1}])
def test_extension_says_that_the_schedule_stretches(setting):
    (note,) = check_resume(config(**setting), config(total_epochs=2.0, **setting), epoch_examples=80)
    assert note.endswith("; the learning-rate schedule stretches with it")


def test_length_is_compared_across_units():
    notes = check_resume(config(), config(total_epochs=None, total_steps=15), epoch_examples=80)
    assert notes == ["the run is extended from 10 to 15 steps (total_epochs=1.0 -> total_steps=15)"]
    with pytest.raises(
        UserError, match="a run of 10 steps .total_epochs=1.0. and total_steps=5 asks for 5, expected as"
    ):
        check_resume(config(), config(total_epochs=None, total_steps=5), epoch_examples=80)


def test_shorter_runs_are_refused():
    with pytest.raises(UserError, match="asks for 5, expected as many or more: lengthen the run"):
        check_resume(config(), config(total_epochs=0.5), epoch_examples=80)
