"""Curves of a run as one PNG, drawn from its `metrics.jsonl`."""

import json
from pathlib import Path

EVALUATION = "eval/"  # prefix of what an evaluation measured
RATE = "learning_rate"
# Not drawn.
BOOKKEEPING = ("steps_per_second", "examples_per_second", "seconds", "examples", "good_rows", "peak_memory_bytes")

Curve = tuple[list[int], list[int | float]]


def read_curves(metrics_jsonl: str | Path) -> dict[str, Curve]:
    """`{name: (steps, values)}` of every number in the file, in its order; null (a non-finite value) leaves a gap."""
    curves: dict[str, Curve] = {}
    with open(metrics_jsonl, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    return curves


def panels(curves: dict[str, Curve]) -> dict[str, list[str]]:
    """Which curves share an axis: `{title: names}`, in the order drawn.

    Losses of training and evaluation share one, evaluation's scores in [0, 1] (accuracies, F1) another, and every
    other metric has its own. What an evaluation measured in more detail (`eval/accuracy_by_family/...`) is left to
    the files.
    """
    grouped: dict[str, list[str]] = {"loss": [], "evaluation scores": [], "learning rate": []}
    for name, (_, values) in curves.items():
        measured = name.removeprefix(EVALUATION)
        if "/" in measured or measured in BOOKKEEPING:
            continue
        if measured.endswith("loss"):
            grouped["loss"].append(name)
        elif name == RATE:
            grouped["learning rate"].append(name)
        elif name.startswith(EVALUATION) and all(0 <= value <= 1 for value in values):
            grouped["evaluation scores"].append(name)
        else:
            grouped[name.replace("_", " ")] = [name]
    return {title: names for title, names in grouped.items() if names}


def plot_curves(metrics_jsonl: str | Path, png: str | Path, title: str = "") -> None:
    """Draws training and evaluation curves against the step; writes nothing while no metric has been logged.

    Args:
      metrics_jsonl: written by `train_jax.report.reporter.Reporter`.
      png: path to write.
      title: heading, e.g. the run's name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import, needed once at the end of a run
    from matplotlib.figure import Figure

    curves = read_curves(metrics_jsonl)
    layout = panels(curves)
    if not layout:
        return
    columns = min(2, len(layout))
    rows = -(-len(layout) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.4 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (heading, names) in zip(axes, layout.items(), strict=False):
        _draw(axis, heading, {name: curves[name] for name in names})
    for axis in axes[len(layout) :]:
        axis.set_axis_off()
    if title:
        figure.suptitle(title)
    figure.savefig(png, dpi=120)


def _draw(axis, heading: str, curves: dict[str, Curve]) -> None:
    """One panel; evaluations, which are few, show their points."""
    for name, (steps, values) in curves.items():
        few = name.startswith(EVALUATION) or len(steps) == 1
        axis.plot(steps, values, marker="o" if few else "", markersize=4, linewidth=1.5 if few else 1.0, label=name)
    axis.set(title=heading, xlabel="step", ylabel=heading)
    axis.grid(alpha=0.3)
    if heading == "learning rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    if list(curves) != [heading.replace(" ", "_")]:  # else the heading is the name already
        axis.legend(fontsize="small")
