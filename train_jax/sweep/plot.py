"""The picture of a sweep: bars by name or lines against x, a panel for each number, from what sweep.json holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_jax.sweep.report import with_spread

WIDE = 10.0  # ratio of the largest x to the smallest from which on the axis is logarithmic
MOST_IN_A_COLUMN = 3  # panels
MARKED = 12  # values of x on a line that are all written at the axis
APART = 1.35  # ratio of two that are written beside one another on a logarithmic axis


def plot(summary: Mapping[str, Any], png: str | Path) -> None:
    """Draws the metric of every run and mean +- standard deviation of every group; against x where the sweep has one.

    Writes nothing while no run has a value.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import, needed once at the end
    from matplotlib.figure import Figure

    views = [_view(summary, name) for name in (summary["metric"], *summary["more"])]
    views = [view for view in views if view["groups"]]
    if not views:
        return
    against_x = all(group["x"] is not None for group in views[0]["groups"])
    height = 4.4 if against_x else 1.6 + 0.4 * len(views[0]["groups"])
    curves = [name for name in summary["curves"] if any(group["curves"][name] for group in summary["groups"])]
    heights = [height] * len(views) + [4.4] * len(curves)
    columns = 1 if len(heights) <= MOST_IN_A_COLUMN else 2
    rows = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
    figure = Figure(figsize=(6.4 * columns, sum(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows).ravel()
    for axis in axes[len(heights) :]:
        axis.remove()
    axes = axes[: len(heights)]
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis, view in zip(axes, views, strict=False):
        (_against_x if against_x else _by_name)(axis, view, view["groups"])
    for axis, name in zip(axes[len(views) :], curves, strict=True):
        _curves(axis, name, summary["groups"])
    figure.savefig(png, dpi=120)


def _curves(axis, name: str, groups: list[dict[str, Any]]) -> None:
    """A line of each group that has the curve."""
    values = []
    for group in groups:
        points = [point for point in group["curves"][name] if point["mean"] is not None]
        if points:
            axis.errorbar(
                [point["x"] for point in points], [point["mean"] for point in points],
                [point["std"] or 0.0 for point in points], marker="o", markersize=3, capsize=3, label=group["name"],
            )  # fmt: skip
            values += [(point["x"], point["mean"]) for point in points]
    for scale, numbers in zip((axis.set_xscale, axis.set_yscale), zip(*values, strict=True), strict=True):
        if min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE:
            scale("log")
    places = sorted({x for x, _ in values})
    if axis.get_xscale() == "log" and len(places) <= MARKED:
        _mark(axis, places)
    of, _, along = name.rpartition("_by_")
    axis.set(ylabel=(of or name).replace("_", " "), xlabel=along.replace("_", " ") if of else "")
    axis.legend(fontsize="small")


def _mark(axis, places: list[float]) -> None:
    """Writes the values themselves at the axis and no others; of a logarithmic one those that have room."""
    if axis.get_xscale() == "log":
        roomy = places[:1]
        for place in places[1:]:
            roomy += [place] if place >= APART * roomy[-1] else []
        places = roomy
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.set_xticks([], minor=True)


def _view(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The summary as if `name` were its metric, with the groups that have a value of it."""
    if name == summary["metric"]:
        runs, groups = summary["runs"], summary["groups"]
    else:
        runs = [run | {"value": run["more"][name]} for run in summary["runs"]]
        groups = [group | group["more"][name] for group in summary["groups"]]
    return dict(summary) | {"metric": name, "runs": runs, "groups": [g for g in groups if g["mean"] is not None]}


def _against_x(axis, summary: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """A line of each series, where every run sets x and each of its groups another; else single points with names."""
    groups = sorted(groups, key=lambda group: group["x"])
    places = sorted({group["x"] for group in groups})
    series = list(dict.fromkeys(group["series"] for group in groups))
    line = all(summary["x"] in run["overrides"] for run in summary["runs"]) and len(groups) == len(
        {(group["series"], group["x"]) for group in groups}
    )
    for name in series:
        own = [group for group in groups if group["series"] == name]
        axis.errorbar(
            [group["x"] for group in own], [group["mean"] for group in own], [group["std"] or 0.0 for group in own],
            marker="o", linestyle="-" if line else "", capsize=4, label=str(name),
        )  # fmt: skip
    runs = [run for run in summary["runs"] if run["value"] is not None and run["x"] is not None]
    axis.scatter([run["x"] for run in runs], [run["value"] for run in runs], s=10, color="grey", zorder=3)
    if not line:
        axis.margins(x=0.15)  # room for the names
        for group in groups:
            axis.annotate(
                group["name"], (group["x"], group["mean"]), xytext=(4, 4), textcoords="offset points", fontsize="small"
            )
    if min(places) > 0 and max(places) / min(places) >= WIDE:
        axis.set_xscale("log")
    if line and len(places) <= MARKED:
        _mark(axis, places)
    if summary["metric"].endswith("_bytes"):
        axis.set_yscale("log")
    if summary["series"]:
        axis.legend(title=summary["series"])
    axis.set(xlabel=summary["x"], ylabel=summary["metric"])


def _by_name(axis, summary: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """One bar a group with its number beside it, as bars from 0 look alike; the first on top."""
    names = [group["name"] for group in groups]
    bars = axis.barh(
        range(len(groups)), [group["mean"] for group in groups], xerr=[group["std"] or 0.0 for group in groups],
        height=0.6, capsize=4, alpha=0.7,
    )  # fmt: skip
    axis.bar_label(bars, [with_spread(group) for group in groups], padding=8, fontsize="small")
    axis.margins(x=0.4)  # room for these
    by_run = {run["name"]: run["value"] for run in summary["runs"]}
    for place, group in enumerate(groups):
        values = [by_run[name] for name in group["runs"] if by_run[name] is not None]
        axis.scatter(values, [place] * len(values), s=10, color="grey", zorder=3)
    axis.set_yticks(range(len(groups)), names)
    axis.invert_yaxis()
    axis.set_xlabel(summary["metric"])
