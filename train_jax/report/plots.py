"""Plots the curves of a run from its `metrics.jsonl`."""

import json
from pathlib import Path

from train_jax.report.figure_text import drawable

EVALUATION = "eval/"  # prefix of evaluation metrics
LEARNING_RATE = "learning_rate"
# Metrics without a curve.
BOOKKEEPING = ("steps_per_second", "examples_per_second", "seconds", "examples", "good_rows", "peak_memory_bytes")

Curve = tuple[list[int], list[int | float]]


def read_curves(metrics_jsonl: str | Path) -> dict[str, Curve]:
    """Returns `{name: (steps, values)}` for every number in the file; null (a non-finite value) leaves a gap."""
    curves: dict[str, Curve] = {}
    with Path(metrics_jsonl).open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    return curves


def panels(curves: dict[str, Curve]) -> dict[str, list[str]]:
    """Groups curves by panel: returns `{title: names}` in the order of the panels.

    The losses of training and evaluation share a panel, evaluation scores in [0, 1] (accuracies, F1) share another, and
    every other metric has its own. Detailed evaluation metrics (`eval/accuracy_by_family/...`) are not plotted.
    """
    grouped: dict[str, list[str]] = {"loss": [], "evaluation scores": [], "learning rate": []}
    for name, (_, values) in curves.items():
        metric = name.removeprefix(EVALUATION)
        if "/" in metric or metric in BOOKKEEPING:
            continue
        if metric.endswith("loss"):
            grouped["loss"].append(name)
        elif name == LEARNING_RATE:
            grouped["learning rate"].append(name)
        elif name.startswith(EVALUATION) and all(0 <= value <= 1 for value in values):
            grouped["evaluation scores"].append(name)
        else:
            grouped[name.replace("_", " ")] = [name]
    return {title: names for title, names in grouped.items() if names}


def plot_curves(metrics_jsonl: str | Path, png: str | Path, title: str = "") -> None:
    """Plots training and evaluation curves against the step; writes no file if no metric has been logged.

    Args:
      metrics_jsonl: written by `train_jax.report.reporter.Reporter`.
      png: path to write.
      title: title of the figure, e.g. the run's name.
    """
    from matplotlib.figure import Figure  # takes 0.5 s to import, and is needed once at the end

    curves = read_curves(metrics_jsonl)
    layout = panels(curves)
    if not layout:
        return
    columns = min(2, len(layout))
    rows = -(-len(layout) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (heading, names) in zip(axes, layout.items(), strict=False):
        _draw(axis, heading, {name: curves[name] for name in names})
    for axis in axes[len(layout) :]:
        axis.set_axis_off()
    if title:
        figure.suptitle(drawable(title), parse_math=False)
    figure.savefig(png, dpi=120)


def _draw(axis, heading: str, curves: dict[str, Curve]) -> None:
    """Draws one panel; evaluations, which are few, have markers."""
    for name, (steps, values) in curves.items():
        few = name.startswith(EVALUATION) or len(steps) == 1
        axis.plot(steps, values, marker="o" if few else "", markersize=4, linewidth=1.5 if few else 1.0, label=name)
    axis.set(title=heading, xlabel="step", ylabel=heading)
    axis.grid(alpha=0.3)
    if heading == "learning rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    if list(curves) != [heading.replace(" ", "_")]:  # otherwise the heading is the name
        axis.legend(fontsize="small")
