"""Plots a sweep from the content of sweep.json: one panel per metric, as bars by name or as lines against x."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from train_jax.sweep.report import with_spread

LOG_SCALE_RATIO = 10.0  # an axis is logarithmic if its largest value is at least this multiple of the smallest
MAX_PANELS_IN_COLUMN = 3
MAX_TICKS = 12  # with more values of x, matplotlib chooses the ticks
MIN_TICK_RATIO = 1.35  # of neighbouring ticks of a logarithmic axis


def plot(summary: Mapping[str, Any], png: str | Path) -> None:
    """Plots the metrics of every run and the mean and standard deviation of every group, against x if the sweep has it.

    Writes no file if no run has a value of any metric.

    Args:
      summary: content of sweep.json.
      png: path of the image to write.
    """
    from matplotlib.figure import Figure  # takes 0.5 s to import, and is needed once at the end

    views = [_view(summary, name) for name in (summary["metric"], *summary["more"])]
    views = [view for view in views if view["groups"]]
    if not views:
        return
    against_x = all(group["x"] is not None for group in views[0]["groups"])
    height = 4.4 if against_x else 1.6 + 0.4 * len(views[0]["groups"])
    curves = [name for name in summary["curves"] if any(group["curves"][name] for group in summary["groups"])]
    heights = [height] * len(views) + [4.4] * len(curves)
    columns = 1 if len(heights) <= MAX_PANELS_IN_COLUMN else 2
    row_heights = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
    figure = Figure(figsize=(6.4 * columns, sum(row_heights)), layout="constrained")
    axes = figure.subplots(len(row_heights), columns, squeeze=False, height_ratios=row_heights).ravel()
    for axis in axes[len(heights) :]:
        axis.remove()
    axes = axes[: len(heights)]
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis, view in zip(axes, views, strict=False):
        (_plot_against_x if against_x else _plot_bars)(axis, view, view["groups"])
    for axis, name in zip(axes[len(views) :], curves, strict=True):
        _plot_curves(axis, name, summary["groups"])
    figure.savefig(png, dpi=120)


def _plot_curves(axis, name: str, groups: list[dict[str, Any]]) -> None:
    """Plots one curve as a line for each group that has it."""
    values = []
    for group in groups:
        points = [point for point in group["curves"][name] if point["mean"] is not None]
        if points:
            axis.errorbar(
                [point["x"] for point in points], [point["mean"] for point in points],
                [point["std"] or 0.0 for point in points], marker="o", markersize=3, capsize=3, label=group["name"],
            )  # fmt: skip
            values += [(point["x"], point["mean"]) for point in points]
    for set_scale, numbers in zip((axis.set_xscale, axis.set_yscale), zip(*values, strict=True), strict=True):
        if _spans_decade(numbers):
            set_scale("log")
    ticks = sorted({x for x, _ in values})
    if axis.get_xscale() == "log" and len(ticks) <= MAX_TICKS:
        _set_ticks(axis, ticks)
    y_name, _, x_name = name.rpartition("_by_")
    axis.set(ylabel=(y_name or name).replace("_", " "), xlabel=x_name.replace("_", " ") if y_name else "")
    axis.legend(fontsize="small")


def _spans_decade(values: Collection[int | float]) -> bool:
    """Returns whether the values are positive and spread widely enough for a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) >= LOG_SCALE_RATIO


def _set_ticks(axis, ticks: list[float]) -> None:
    """Sets the ticks of the x axis; on a logarithmic axis, skips those too close to the tick before them."""
    if axis.get_xscale() == "log":
        spaced = ticks[:1]
        for tick in ticks[1:]:
            spaced += [tick] if tick >= MIN_TICK_RATIO * spaced[-1] else []
        ticks = spaced
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)


def _view(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the summary with `name` as its metric, and only the groups that have a value of it."""
    if name == summary["metric"]:
        runs, groups = summary["runs"], summary["groups"]
    else:
        runs = [run | {"value": run["more"][name]} for run in summary["runs"]]
        groups = [group | group["more"][name] for group in summary["groups"]]
    return dict(summary) | {"metric": name, "runs": runs, "groups": [g for g in groups if g["mean"] is not None]}


def _plot_against_x(axis, summary: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Plots the groups against x.

    The points of a series are connected if every run overrides x and no two groups of the series have the same x.
    Otherwise each point is labeled with the name of its group.
    """
    groups = sorted(groups, key=lambda group: group["x"])
    xs = sorted({group["x"] for group in groups})
    connected = all(summary["x"] in run["overrides"] for run in summary["runs"]) and len(groups) == len(
        {(group["series"], group["x"]) for group in groups}
    )
    for name in dict.fromkeys(group["series"] for group in groups):
        members = [group for group in groups if group["series"] == name]
        axis.errorbar(
            [group["x"] for group in members], [group["mean"] for group in members],
            [group["std"] or 0.0 for group in members],
            marker="o", linestyle="-" if connected else "", capsize=4, label=str(name),
        )  # fmt: skip
    runs = [run for run in summary["runs"] if run["value"] is not None and run["x"] is not None]
    axis.scatter([run["x"] for run in runs], [run["value"] for run in runs], s=10, color="grey", zorder=3)
    if not connected:
        axis.margins(x=0.15)  # room for the names
        for group in groups:
            axis.annotate(
                group["name"], (group["x"], group["mean"]), xytext=(4, 4), textcoords="offset points", fontsize="small"
            )
    if _spans_decade(xs):
        axis.set_xscale("log")
    if connected and len(xs) <= MAX_TICKS:
        _set_ticks(axis, xs)
    if summary["metric"].endswith("_bytes"):
        axis.set_yscale("log")
    if summary["series"]:
        axis.legend(title=summary["series"])
    axis.set(xlabel=summary["x"], ylabel=summary["metric"])


def _plot_bars(axis, summary: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Plots one bar per group, the first on top, and writes its value beside it, as bars of close values look equal."""
    names = [group["name"] for group in groups]
    bars = axis.barh(
        range(len(groups)), [group["mean"] for group in groups], xerr=[group["std"] or 0.0 for group in groups],
        height=0.6, capsize=4, alpha=0.7,
    )  # fmt: skip
    axis.bar_label(bars, [with_spread(group) for group in groups], padding=8, fontsize="small")
    axis.margins(x=0.4)  # room for the labels
    value_of_run = {run["name"]: run["value"] for run in summary["runs"]}
    for position, group in enumerate(groups):
        values = [value_of_run[name] for name in group["runs"] if value_of_run[name] is not None]
        axis.scatter(values, [position] * len(values), s=10, color="grey", zorder=3)
    axis.set_yticks(range(len(groups)), names)
    axis.invert_yaxis()
    axis.set_xlabel(summary["metric"])
