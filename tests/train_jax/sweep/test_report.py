"""Tables, pooled seeds and figures of sweeps, from hand-written results."""

import math

import pytest
from matplotlib.figure import Figure

from tests.train_jax.toy_task import toy_config
from train_jax.sweep import plot
from train_jax.sweep import report as sweep_report
from train_jax.sweep.report import Outcome, SweepFields, table


def outcome(name, value, **overrides):
    overrides = {key.replace("__", "."): item for key, item in overrides.items()}
    config = toy_config(**{key.replace(".", "__"): item for key, item in overrides.items()})
    results = {"score": value, "trainable_parameters": 1234, "seconds": 61.4, "step": 8, "peak_memory_bytes": 1}
    return Outcome(name, overrides, config, results if value is not None else None)


def summarize(metric, x, outcomes, **more):
    return sweep_report.summarize(SweepFields(metric, x, **more), outcomes)


@pytest.fixture
def summary():
    """A summary of width 4 with three seeds, width 40 with one, and a run that is not complete."""
    outcomes = [outcome(f"a{seed}", score, model__width=4, seed=seed) for seed, score in enumerate((0.1, 0.2, 0.6))]
    return summarize("score", "model.width", [*outcomes, outcome("b", 0.5, model__width=40), outcome("c", None)])


def test_seeds_are_pooled(summary):
    pooled, single, missing = summary["groups"]
    assert pooled["name"] == "model.width=4" and pooled["runs"] == ["a0", "a1", "a2"] and pooled["values"] == 3
    assert pooled["mean"] == pytest.approx(0.3) and pooled["std"] == pytest.approx(math.sqrt(0.07))
    assert (single["name"], single["mean"], single["std"], single["x"]) == ("b", 0.5, None, 40)
    assert missing["mean"] is None and missing["values"] == 0


def test_a_group_is_named_as_its_runs_without_the_seed():
    runs = [outcome(f"wide-seed-{seed}", 0.5, model__width=40, seed=seed) for seed in (0, 1)]
    (group,) = summarize("score", None, runs)["groups"]
    assert group["name"] == "wide"
    (group,) = summarize("score", None, [outcome(f"seed{seed}", 0.5, seed=seed) for seed in (0, 1)])["groups"]
    assert group["name"] == "no overrides"


def test_nonfinite_values_are_excluded_from_the_mean():
    runs = [outcome("a", 0.5, seed=0), outcome("b", math.nan, seed=1)]
    (group,) = summarize("score", None, runs)["groups"]
    assert (group["mean"], group["std"], group["values"]) == (0.5, None, 1)


def test_tables_have_a_row_for_each_run_and_each_group(summary):
    runs, groups = (part.splitlines() for part in table(summary).split("\n\n"))
    assert [cell.strip() for cell in runs[0].split("|")] == [
        "", "run", "model.width", "seed", "score", "trainable parameters", "seconds", ""
    ]  # fmt: skip
    assert [cell.strip() for cell in runs[2].split("|")] == ["", "a0", "4", "0", "0.1000", "1,234", "61", ""]
    assert [cell.strip() for cell in runs[-1].split("|")] == ["", "c", "", "", "not complete", "", "", ""]
    assert len(set(map(len, runs))) == 1  # aligned
    assert [cell.strip() for cell in groups[2].split("|")] == ["", "model.width=4", "3", "0.3000", "0.2646", ""]
    assert "model.width=4" not in table(summarize("score", None, [outcome("a", 0.5, model__width=4)]))


def test_vertical_bars_are_escaped_in_the_table():
    text = table(summarize("score", None, [outcome("a", 0.5, model__trainable="head|tower")]))
    assert r"head\|tower" in text


def test_the_table_has_deviations_of_further_metrics_and_shortens_long_values():
    runs = [outcome(f"a-seed-{seed}", 0.5, seed=seed, model__trainable="word " * 50) for seed in range(2)]
    for loss, run in enumerate(runs):
        run.results["loss"] = 1.0 + loss
    text = table(summarize("score", None, runs, more=("loss",)))
    assert "| 1.5000 ± 0.7071 " in text
    assert "word word wo... |" in text and max(map(len, text.splitlines())) < 160


def test_scores_are_given_by_run_and_averaged_over_seeds():
    runs = [outcome(f"wide-seed-{seed}", value, seed=seed) for seed, value in enumerate((0.2, 0.6, None))]
    scores = sweep_report.scores(summarize("score", None, runs, more=("seconds",)))
    assert list(scores) == ["wide"]
    by_run, mean, std = scores["wide"]["runs"], scores["wide"]["mean"], scores["wide"]["std"]
    assert by_run["wide-seed-0"] == {"score": 0.2, "seconds": 61.4, "trainable_parameters": 1234}
    assert by_run["wide-seed-2"] == dict.fromkeys(by_run["wide-seed-0"])  # not complete
    assert mean == pytest.approx({"score": 0.4, "seconds": 61.4, "trainable_parameters": 1234})
    assert std == pytest.approx({"score": math.sqrt(0.08), "seconds": 0.0, "trainable_parameters": 0.0})


def axis_against_x(summary):
    axis = Figure().subplots()
    groups = [group for group in summary["groups"] if group["mean"] is not None]
    plot._plot_against_x(axis, summary, groups)
    return axis


def test_plot_against_x_has_means_and_error_bars(summary):
    summary["runs"].pop()
    axis = axis_against_x(summary)
    line, _, (bars,) = axis.containers[0]
    assert list(line.get_xdata()) == [4, 40] and list(line.get_ydata()) == pytest.approx([0.3, 0.5])
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(math.sqrt(0.07))
    assert line.get_linestyle() == "-" and axis.get_xscale() == "log" and not axis.texts
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "40"]


def test_points_against_a_measured_x_are_labeled():
    runs = [outcome("a", 0.1, model__width=4), outcome("b", 0.2, model__dropout=0.5)]
    axis = axis_against_x(summarize("score", "trainable_parameters", runs))
    assert axis.containers[0][0].get_linestyle() == "None" and [text.get_text() for text in axis.texts] == ["a", "b"]


def test_plot_without_x_has_a_bar_for_each_group(summary, tmp_path):
    summary["x"] = None
    for group in summary["groups"]:
        group["x"] = None
    axis = Figure().subplots()
    plot._plot_bars(axis, summary, summary["groups"][:2])
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.3, 0.5])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["model.width=4", "b"]
    plot.plot(summary, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_written_without_values(tmp_path):
    plot.plot(summarize("score", None, [outcome("a", None)]), tmp_path / "sweep.png")
    assert not (tmp_path / "sweep.png").exists()


def test_plot_has_a_line_for_each_series_and_a_panel_for_each_metric(tmp_path):
    """Two dropouts at two widths; seconds are the same everywhere."""
    outcomes = [
        outcome(f"{width}-{rate}", width * rate, model__width=width, model__dropout=rate)
        for width in (4, 40)
        for rate in (0.1, 0.5)
    ]
    summary = summarize("score", "model.width", outcomes, series="model.dropout", more=("seconds",))
    axis = axis_against_x(summary)
    lines = [container[0] for container in axis.containers]
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx([0.4, 4.0]), pytest.approx([2.0, 20.0])]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0.1", "0.5"]
    view = plot._view(summary, "seconds")
    assert {group["mean"] for group in view["groups"]} == {61.4} and view["metric"] == "seconds"
    assert "| score " in table(summary) and table(summary).count("61.4") == 4
    plot.plot(summary, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_no_run_has_gets_no_panel(tmp_path):
    outcomes = [outcome("a", 0.5, model__width=4), outcome("b", 0.5, model__width=40)]
    plot.plot(summarize("score", "model.width", outcomes, more=("nothing",)), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").exists()


def test_curves_of_a_group_are_averaged_at_shared_points(tmp_path):
    def with_curve(name, seed, points):
        run = outcome(name, 0.5, model__width=4, seed=seed)
        return run._replace(results=run.results | {"by_step": points})

    runs = [with_curve("a-seed-0", 0, [[1, 2.0], [2, 4.0]]), with_curve("a-seed-1", 1, [[1, 4.0], [3, 1.0]])]
    summary = summarize("score", None, runs, curves=("by_step",))
    (point,) = summary["groups"][0]["curves"]["by_step"]
    assert (point["x"], point["mean"], point["std"]) == (1, 3.0, pytest.approx(math.sqrt(2)))
    axis = Figure().subplots()
    plot._plot_curves(axis, "by_step", summary["groups"])
    assert list(axis.containers[0][0].get_ydata()) == [3.0]
    plot.plot(summary, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
