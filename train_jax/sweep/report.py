"""Reports of a sweep: the summary in sweep.json, the scores in eval.json and a table; seeds are pooled in groups."""

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
COPIED_RESULTS = ("step", "trainable_parameters", "seconds", "peak_memory_bytes")  # from eval.json to sweep.json
MAX_OVERRIDE_LENGTH = 40  # characters of an overridden value in the table


class SweepFields(NamedTuple):
    """The names of the results and config keys by which runs are compared, from `config.sweep`."""

    metric: str
    x: str | None = None
    series: str | None = None
    more: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """The current state of one run of a sweep."""

    name: str
    overrides: dict[str, Any]
    config: ConfigDict
    results: dict[str, Any] | None  # content of eval.json; None if the run is not complete
    stopped: str | None = None  # message of the error that stopped the run


def summarize(fields: SweepFields, outcomes: list[Outcome]) -> dict[str, Any]:
    """Returns the content of sweep.json: the `fields`, `runs`, and `groups` of runs that differ only in the seed.

    Args:
      fields: `metric` names a result, stored as a run's `value`. `x` names a config key or a result, and `series` one
        config key or several joined by commas; their values are stored as `x` and `series`, None without a name.
        `more` names further results, and `curves` results that are lists of [x, y]; both are stored by name.
      outcomes: the runs in the order of the sweep.
    """
    runs = [_run(fields, outcome) for outcome in outcomes]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        group_key = files.to_json(dict(sorted(_without_seed(run["overrides"]).items())))
        groups.setdefault(group_key, []).append(run)
    header = fields._asdict() | {"more": list(fields.more), "curves": list(fields.curves)}
    return header | {"runs": runs, "groups": [_group(fields, members) for members in groups.values()]}


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a sweep's eval.json: for each group its results by run, their mean and deviation.

    The results are the metric, `more` and the number of trainable parameters; the deviation is that of the sample.
    """
    trainable = "trainable_parameters"
    runs = {
        run["name"]: {summary["metric"]: run["value"], **run["more"], trainable: run[trainable]}
        for run in summary["runs"]
    }
    result = {}
    for group in summary["groups"]:
        members = {name: runs[name] for name in group["runs"]}
        names = next(iter(members.values()))
        moments = {name: _moments([values[name] for values in members.values()]) for name in names}
        result[group["name"]] = {
            "runs": members,
            "mean": {name: moment["mean"] for name, moment in moments.items()},
            "std": {name: moment["std"] for name, moment in moments.items()},
        }
    return result


def _run(fields: SweepFields, outcome: Outcome) -> dict[str, Any]:
    """Returns the entry of a run in sweep.json."""
    results, settings = outcome.results or {}, leaves(outcome.config)
    run = {"name": outcome.name, "overrides": outcome.overrides, "complete": outcome.results is not None}
    if outcome.stopped:
        run["stopped"] = outcome.stopped
    x = settings.get(fields.x, results.get(fields.x)) if fields.x else None
    series = ", ".join(str(settings[key]) for key in fields.series.split(",")) if fields.series else None
    run |= {"x": x, "series": series, "value": results.get(fields.metric)}
    for field, names in (("more", fields.more), ("curves", fields.curves)):
        run[field] = {name: results.get(name) for name in names}
    return run | {name: results.get(name) for name in COPIED_RESULTS}


def _group(fields: SweepFields, members: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the entry of a group in sweep.json, from the entries of its runs."""
    xs = [run["x"] for run in members if _is_number(run["x"])]
    return {
        "name": _name(members),
        "runs": [run["name"] for run in members],
        "x": statistics.fmean(xs) if xs else None,
        "series": members[0]["series"],
        **_moments([run["value"] for run in members]),
        "more": {name: _moments([run["more"][name] for run in members]) for name in fields.more},
        "curves": {name: _mean_curve([run["curves"][name] for run in members]) for name in fields.curves},
    }


def _mean_curve(curves: list[Any]) -> list[dict[str, Any]]:
    """Returns the mean and standard deviation of y at every x that all the curves have."""
    tables = [dict(curve) for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [{"x": x} | _moments([table[x] for table in tables]) for x in shared]


def _name(members: list[dict[str, Any]]) -> str:
    """Returns the name of a group of runs.

    It is the name that they share, without the seed if there are several ("rank-4" for "rank-4-seed-0"), or else their
    overrides without the seed.
    """
    names = {run["name"] for run in members}
    if len(names) > 1:
        names = {SEED_IN_NAME.sub("", name) for name in names}
    if len(names) == 1 and names != {""}:
        return names.pop()
    return describe(_without_seed(members[0]["overrides"]))


def _without_seed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key != SEED}


def _moments(values: list[Any]) -> dict[str, Any]:
    """Returns count, mean and sample standard deviation of the finite numbers; None where there are too few."""
    values = [value for value in values if _is_number(value)]
    return {
        "values": len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def describe(overrides: Mapping[str, Any]) -> str:
    """Returns overrides as text, such as "adapter.rank=4 seed=1"."""
    return " ".join(f"{key}={value}" for key, value in overrides.items()) or "no overrides"


def table(summary: Mapping[str, Any]) -> str:
    """Returns the runs as a Markdown table, followed by a table of the groups if any of them has several runs."""
    keys = list(dict.fromkeys(key for run in summary["runs"] for key in run["overrides"]))
    more = summary["more"]
    rows = [["run", *keys, summary["metric"], *more, "trainable parameters", "seconds"]]
    for run in summary["runs"]:
        state = "stopped" if "stopped" in run else "null" if run["complete"] else "not complete"
        value = _text(run["value"]) if run["value"] is not None else state
        overrides = [_shortened(_text(run["overrides"].get(key))) for key in keys]
        further = [_text(run["more"][name]) for name in more]
        costs = [_text(run["trainable_parameters"]), _text(run["seconds"], 0)]
        rows.append([run["name"], *overrides, value, *further, *costs])
    text = _markdown(rows)
    if any(len(group["runs"]) > 1 for group in summary["groups"]):
        rows = [
            ["", "runs", f"mean {summary['metric']}", "standard deviation", *(f"{name}, mean ± std" for name in more)]
        ]
        for group in summary["groups"]:
            further = [with_spread(group["more"][name]) for name in more]
            rows.append([group["name"], _text(group["values"]), _text(group["mean"]), _text(group["std"]), *further])
        text += "\n" + _markdown(rows)
    return text


def with_spread(group: Mapping[str, Any]) -> str:
    """Returns the mean and standard deviation as text, such as "0.8854 ± 0.0055"; only the mean of a single value."""
    return " ± ".join(_text(group[key]) for key in ("mean", "std") if group[key] is not None)


def _shortened(text: str) -> str:
    """Shortens an overridden value for the table; config.json of the run has all of it."""
    return text if len(text) <= MAX_OVERRIDE_LENGTH else f"{text[: MAX_OVERRIDE_LENGTH - 3]}..."


def _text(value: Any, decimals: int = 4) -> str:
    """Formats a value for a cell of the table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{decimals}f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


def _markdown(rows: list[list[str]]) -> str:
    """Formats rows of cells, the first of which is the header, as an aligned Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]  # regular expressions contain bars
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |\n" for row in rows
    )
