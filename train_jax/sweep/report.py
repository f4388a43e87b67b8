"""What a sweep found: a summary for sweep.json, scores, a table. Runs that differ by seed alone are pooled."""

import math
import re
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from train_jax.config.base import leaves
from train_jax.core import files

SEED = "seed"
SEED_IN_NAME = re.compile(r"[-_.]*seed[-_.=]*\d+$")
COPIED = ("step", "trainable_parameters", "seconds", "peak_memory_bytes")  # of eval.json
WIDEST = 40  # characters of an overridden value in the table


class Drawn(NamedTuple):
    """What of the runs is compared; see the config's `sweep`."""

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
            others = [with_spread(group["more"][name]) for name in more]
            rows.append([group["name"], _text(group["values"]), _text(group["mean"]), _text(group["std"]), *others])
        text += "\n" + _markdown(rows)
    return text


def with_spread(found: Mapping[str, Any]) -> str:
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
