"""What a sweep found: a summary for sweep.json, a table, and a picture. Runs that differ by seed alone are pooled."""

import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from train_jax import files
from train_jax.config import leaves

SEED = "seed"
SEED_IN_NAME = re.compile(r"[-_.]*seed[-_.=]*\d+$")
COPIED = ("step", "trainable_parameters", "seconds", "peak_memory_bytes")  # of eval.json
WIDE = 10.0  # ratio of the largest x to the smallest from which on the axis is logarithmic
WIDEST = 40  # characters of an overridden value in the table
MOST_IN_A_COLUMN = 3  # panels
MARKED = 12  # values of x on a line that are all written at the axis
APART = 1.35  # ratio of two that are written beside one another on a logarithmic axis


class Drawn(NamedTuple):
    """What of the runs is compared; see the config's keys `sweep_...`."""

    metric: str
    x: str | None = None
    series: str | None = None
    more: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """A run of a sweep as it stands."""

    name: str
    overrides: dict[str, Any]
    config: ConfigDict
    results: dict[str, Any] | None  # what eval.json holds; None where the run is not complete
    stopped: str | None = None  # why it cannot go on


def summarize(drawn: Drawn, outcomes: list[Outcome]) -> dict[str, Any]:
    """What sweep.json holds: `runs` one by one, and `groups` of those that differ in nothing but the seed.

    Args:
      drawn: `metric` is a name in every run's results, its value is `value`; `x` a config key or a name in the results,
        its value is `x`, None without one; `series` a config key, likewise; `more` names, whose values are in `more`,
        and `curves` names of lists of [x, y], in `curves`.
      outcomes: in the sweep's order.
    """
    runs = [_run(drawn, outcome) for outcome in outcomes]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        rest = {key: value for key, value in run["overrides"].items() if key != SEED}
        groups.setdefault(files.to_json(dict(sorted(rest.items()))), []).append(run)
    described = drawn._asdict() | {"more": list(drawn.more), "curves": list(drawn.curves)}
    return described | {"runs": runs, "groups": [_group(drawn, members) for members in groups.values()]}


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the eval.json of a sweep holds: of each group the compared numbers by run, with mean and deviation."""
    trained = "trainable_parameters"
    runs = {
        run["name"]: {summary["metric"]: run["value"], **run["more"], trained: run[trained]} for run in summary["runs"]
    }
    found = {}
    for group in summary["groups"]:
        members = {name: runs[name] for name in group["runs"]}
        spread = {key: _spread([values[key] for values in members.values()]) for key in next(iter(members.values()))}
        found[group["name"]] = {
            "runs": members,
            "mean": {key: of["mean"] for key, of in spread.items()},
            "std": {key: of["std"] for key, of in spread.items()},
        }
    return found


def _run(drawn: Drawn, outcome: Outcome) -> dict[str, Any]:
    results, settings = outcome.results or {}, leaves(outcome.config)
    run = {"name": outcome.name, "overrides": outcome.overrides, "complete": outcome.results is not None}
    if outcome.stopped:
        run["stopped"] = outcome.stopped
    at = settings.get(drawn.x, results.get(drawn.x)) if drawn.x else None
    series = ", ".join(str(settings[key]) for key in drawn.series.split(",")) if drawn.series else None
    run |= {"x": at, "series": series, "value": results.get(drawn.metric)}
    for kind, names in (("more", drawn.more), ("curves", drawn.curves)):
        run[kind] = {name: results.get(name) for name in names}
    return run | {name: results.get(name) for name in COPIED}


def _group(drawn: Drawn, members: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of fewer than two) over the members that have a value."""
    places = [run["x"] for run in members if _is_number(run["x"])]
    return {
        "name": _name(members),
        "runs": [run["name"] for run in members],
        "x": statistics.fmean(places) if places else None,
        "series": members[0]["series"],
        **_spread([run["value"] for run in members]),
        "more": {name: _spread([run["more"][name] for run in members]) for name in drawn.more},
        "curves": {name: _mean_curve([run["curves"][name] for run in members]) for name in drawn.curves},
    }


def _mean_curve(curves: list[Any]) -> list[dict[str, Any]]:
    """At every x that all have: x, and the mean and standard deviation of y."""
    tables = [dict(curve) for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [{"x": x} | _spread([table[x] for table in tables]) for x in shared]


def _name(members: list[dict[str, Any]]) -> str:
    """Of several the name without the seed ("rank-4" of "rank-4-seed-0"), or the overrides where that says nothing."""
    names = {run["name"] for run in members}
    if len(names) > 1:
        names = {SEED_IN_NAME.sub("", name) for name in names}
    if len(names) == 1 and names != {""}:
        return names.pop()
    return describe({key: value for key, value in members[0]["overrides"].items() if key != SEED})


def _spread(values: list[Any]) -> dict[str, Any]:
    """Of those that are finite numbers."""
    values = [value for value in values if _is_number(value)]
    return {
        "values": len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def describe(overrides: Mapping[str, Any]) -> str:
    """E.g. "adapter.rank=4 seed=1"."""
    return " ".join(f"{key}={value}" for key, value in overrides.items()) or "no overrides"


def table(summary: Mapping[str, Any]) -> str:
    """The runs as a Markdown table, and below it the groups where any has several runs."""
    keys = list(dict.fromkeys(key for run in summary["runs"] for key in run["overrides"]))
    more = summary["more"]
    rows = [["run", *keys, summary["metric"], *more, "trainable parameters", "seconds"]]
    for run in summary["runs"]:
        state = "stopped" if "stopped" in run else "null" if run["complete"] else "not complete"
        value = _text(run["value"]) if run["value"] is not None else state
        overrides = [_shortened(_text(run["overrides"].get(key))) for key in keys]
        others = [_text(run["more"][name]) for name in more]
        costs = [_text(run["trainable_parameters"]), _text(run["seconds"], 0)]
        rows.append([run["name"], *overrides, value, *others, *costs])
    text = _markdown(rows)
    if any(len(group["runs"]) > 1 for group in summary["groups"]):
        rows = [
            ["", "runs", f"mean {summary['metric']}", "standard deviation", *(f"{name}, mean ± std" for name in more)]
        ]
        for group in summary["groups"]:
            others = [_with_spread(group["more"][name]) for name in more]
            rows.append([group["name"], _text(group["values"]), _text(group["mean"]), _text(group["std"]), *others])
        text += "\n" + _markdown(rows)
    return text


def _with_spread(found: Mapping[str, Any]) -> str:
    """E.g. "0.8854 ± 0.0055"; the mean alone where there is one value."""
    return " ± ".join(_text(found[key]) for key in ("mean", "std") if found[key] is not None)


def _shortened(text: str) -> str:
    """Its beginning; `config.json` of a run has all of it."""
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _text(value: Any, decimals: int = 4) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{decimals}f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


def _markdown(rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]  # patterns have bars
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |\n" for row in rows
    )


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
    axis.bar_label(bars, [_with_spread(group) for group in groups], padding=8, fontsize="small")
    axis.margins(x=0.4)  # room for these
    by_run = {run["name"]: run["value"] for run in summary["runs"]}
    for place, group in enumerate(groups):
        values = [by_run[name] for name in group["runs"] if by_run[name] is not None]
        axis.scatter(values, [place] * len(values), s=10, color="grey", zorder=3)
    axis.set_yticks(range(len(groups)), names)
    axis.invert_yaxis()
    axis.set_xlabel(summary["metric"])
