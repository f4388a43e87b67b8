"""Sweeps: one command trains a config several times under named overrides, each run in a folder of its own.

    config.sweep.runs = (("rank-1", {"adapter.rank": 1}), ("rank-2", {"adapter.rank": 2}))

Runs follow one another in this process. The same command again skips what is complete and resumes what was cut off,
for each folder is the workdir of an ordinary run. The sweep's own folder holds config.json, sweep.json, sweep.md (the
table that is printed), sweep.png, and at the end eval.json: scores by run, with mean and deviation over the seeds.
"""

import gc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from train_jax import complete, loop
from train_jax.config import command_line
from train_jax.config.base import from_json, leaves, to_json
from train_jax.config.resume_check import SWEEP_FILE, inspect_workdir
from train_jax.config.run_keys import SweepKeys
from train_jax.config.validate import unknown_key, validate
from train_jax.core import files
from train_jax.core.config_keys import config_dict
from train_jax.core.errors import RunStopped, UserError, quoted
from train_jax.core.patterns import did_you_mean
from train_jax.sweep import plot
from train_jax.sweep import report as sweep_report
from train_jax.sweep.report import Outcome

NAME = re.compile(r"\w[\w.=+-]*")
FORM = "expected a tuple of pairs ('name', {'dotted.key': value})"
MEASURED_X = ("trainable_parameters", "seconds", "peak_memory_bytes")  # what every run's eval.json holds


class SweepRun(NamedTuple):
    """One run of a sweep; `config` is its own, with `overrides` in place and no sweep."""

    name: str
    overrides: dict[str, Any]
    config: ConfigDict


def expand(config: ConfigDict) -> list[SweepRun]:
    """The runs of a config's sweep, checked as any config is.

    Raises:
      UserError: a sweep of another form, two runs of one name, a name that is no folder's, or an override that is no
        key or no value of this config.
    """
    validate(config, training=False)
    runs: dict[str, SweepRun] = {}
    for entry in config.sweep.runs:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)):
            raise UserError(
                f"config.sweep.runs holds {quoted(entry)}, {FORM}: correct it (one run alone needs its comma)"
            )
        name, overrides = entry
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"config.sweep.runs names a run {quoted(name)}, expected letters, digits and _ . = + - (it becomes a "
                "folder): rename it"
            )
        if name in runs:
            raise UserError(f"config.sweep.runs has two runs named {name!r}, expected different names: rename one")
        runs[name] = SweepRun(name, dict(overrides), _overridden(config, name, overrides))
    if not runs:
        raise UserError(f"config.sweep.runs is empty, {FORM}: add runs")
    _check_x(config, list(runs.values()))
    return list(runs.values())


def _overridden(config: ConfigDict, name: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """The config of one run: overrides follow the rules of the command line, where a duration replaces another's."""
    single = from_json(to_json(config))
    single.sweep = config_dict(SweepKeys)
    try:
        for key in overrides:
            if key not in leaves(config):
                raise unknown_key(key, config)
            if key.startswith("sweep."):
                raise UserError(f"config.{key} cannot be overridden in a run, expected a key of the run: leave it out")
        command_line.override(single, {key: str(value) for key, value in overrides.items()})
        validate(single)
    except UserError as error:
        raise UserError(f"run {name!r} of config.sweep.runs: {error}") from error
    return single


def _check_x(config: ConfigDict, runs: list[SweepRun]) -> None:
    series, key = config.sweep.series, config.sweep.x
    for part in series.split(",") if series else ():
        if part not in leaves(config):
            raise UserError(
                f"config.sweep.series={part!r} is no config key, expected one: change it"
                f"{did_you_mean(part, list(leaves(config)))}"
            )
    if key is None or key in MEASURED_X:
        return
    if key not in leaves(config):
        names = [*leaves(config), *MEASURED_X]
        raise UserError(
            f"config.sweep.x={key!r} is no config key, expected one or one of {', '.join(MEASURED_X)}: change it"
            f"{did_you_mean(key, names)}"
        )
    for run in runs:
        value = leaves(run.config)[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"config.sweep.x={key!r} is {quoted(value)} in run {run.name!r}, expected a number: name another"
            )


def fit(config: ConfigDict, workdir: str | Path, progress: str = "auto", began: float | None = None) -> dict[str, Any]:
    """Trains and evaluates every run of the sweep that is not complete; returns what `sweep.json` holds.

    Args:
      config: with `sweep`, a tuple of ("name", {"dotted key": value}).
      workdir: folder of the sweep; run `name` lies in `workdir/name`.
      progress: see loop.fit.
      began: the time from which on `seconds` of the first run count; None = now.

    Raises:
      UserError: before anything is trained: a sweep that cannot be, a workdir of a single run, or a folder that holds
        a run with other overrides. Later: as `loop.fit`, or results without `sweep.metric`.
      RunStopped: after all runs, if some stopped at non-finite updates.
      SystemExit: as `loop.fit`; the same command goes on.
    """
    workdir = Path(workdir)
    runs = expand(config)
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a single run, expected a new folder or a sweep's: choose another --workdir")
    drawn = sweep_report.Drawn(
        config.sweep.metric or config.best_metric or "loss",
        config.sweep.x,
        config.sweep.series,
        tuple(config.sweep.more),
        tuple(config.sweep.curves),
    )
    outcomes = {run.name: Outcome(run.name, run.overrides, run.config, _earlier(workdir, run)) for run in runs}
    if jax.process_index() == 0:
        files.write_atomically(workdir / "config.json", to_json(config))
    for number, run in enumerate(runs, 1):
        _write(workdir, drawn, outcomes)
        outcome = outcomes[run.name]
        if outcome.results is None:
            _say(f"[{number}/{len(runs)}] {run.name}: {sweep_report.describe(run.overrides)}")
            try:
                results = loop.fit(run.config, workdir / run.name, progress, began)
                outcomes[run.name] = outcome._replace(results=results)
            except RunStopped as error:
                _say(f"{run.name} stopped: {error}")
                outcomes[run.name] = outcome._replace(stopped=str(error))
            _free()
        else:
            _say(f"[{number}/{len(runs)}] {run.name} is complete, see {workdir / run.name / 'eval.json'}.")
        began = None
        for name in (drawn.metric, *drawn.more):
            _check_metric(name, outcomes[run.name])
    summary = _write(workdir, drawn, outcomes)
    table = sweep_report.table(summary)
    if jax.process_index() == 0:
        files.write_atomically(workdir / "sweep.md", table)
        files.write_atomically(workdir / "eval.json", files.to_json(sweep_report.scores(summary), indent=2) + "\n")
        plot.plot(summary, workdir / "sweep.png")
        print(f"{table}{workdir}: see {SWEEP_FILE}, sweep.md and sweep.png there.", flush=True)
    stopped = [name for name, outcome in outcomes.items() if outcome.stopped]
    if stopped:
        raise RunStopped(
            f"{len(stopped)} of {len(runs)} runs stopped at non-finite updates ({', '.join(stopped)}); the others are "
            f"complete and in {workdir / 'sweep.md'}: change what stopped in config.sweep.runs under a new name."
        )
    return summary


def _earlier(workdir: Path, run: SweepRun) -> dict[str, Any] | None:
    """What a complete run measured; None if something is left to do.

    Raises:
      UserError: the folder holds a run with another config, or of other data.
    """
    try:
        earlier = inspect_workdir(workdir / run.name, run.config)
        if earlier and earlier.results is not None:
            complete.check(run.config, workdir / run.name)
    except UserError as error:
        raise UserError(f"{workdir / run.name}: {error}") from error
    return earlier.results if earlier else None


def _check_metric(metric: str, outcome: Outcome) -> None:
    """Told after the first run: what an evaluation measures is the task's own affair."""
    results = outcome.results
    if results is not None and metric not in results:
        numbers = [name for name, value in results.items() if type(value) in (int, float)]
        raise UserError(
            f"the sweep compares runs by {metric!r}, which {outcome.name}/eval.json does not hold, expected one of "
            f"{', '.join(numbers)}: set config.sweep.metric or config.sweep.more{did_you_mean(metric, numbers)}"
        )


def _write(workdir: Path, drawn: sweep_report.Drawn, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Writes sweep.json as things stand; returns what it holds."""
    summary = files.plain(sweep_report.summarize(drawn, list(outcomes.values())))
    if jax.process_index() == 0:
        files.write_atomically(workdir / SWEEP_FILE, files.to_json(summary, indent=2) + "\n")
    return summary


def _free() -> None:
    """Lets go of what the run before held: arrays in reference cycles, and the programs compiled for its shapes."""
    jax.clear_caches()
    gc.collect()


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
