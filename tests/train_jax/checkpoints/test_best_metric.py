import math

import pytest

from train_jax.checkpoints.best_metric import check_metric, score
from train_jax.core.errors import UserError


def test_larger_scores_are_better_in_either_mode():
    results = [{"accuracy": 0.25}, {"accuracy": 0.75}]
    assert [score(result, "accuracy", "max") for result in results] == [0.25, 0.75]
    assert [score(result, "accuracy", "min") for result in results] == [-0.25, -0.75]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_nonfinite_values_have_no_rank(value, mode):
    assert score({"loss": value}, "loss", mode) == -math.inf


def test_without_results_or_metric_there_is_no_rank():
    assert score(None, "loss", "max") == score({"loss": 1.0}, None, "max") == -math.inf


def test_an_unknown_metric_suggests_the_nearest():
    check_metric(None, ["loss"])
    check_metric("loss", ("accuracy", "loss"))
    with pytest.raises(UserError) as error:
        check_metric("acuracy", ("loss", "accuracy"))
    assert str(error.value) == (
        "config.best_metric='acuracy' is not measured during training, expected one of accuracy, loss: "
        "change it; did you mean 'accuracy'?"
    )
    with pytest.raises(UserError, match="'loss' is not measured .* expected one of accuracy: change it"):
        score({"accuracy": 1.0}, "loss", "max")
