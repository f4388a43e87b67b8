"""Runs a sweep: one command trains a config several times under named overrides, each run in its own folder.

    config.sweep.runs = (("rank-1", {"adapter.rank": 1}), ("rank-2", {"adapter.rank": 2}))

The runs are trained one after another in this process. Each folder is an ordinary workdir, so that repeating the
command skips complete runs and resumes an interrupted one. The folder of the sweep contains config.json, sweep.json,
sweep.md (the table that is also printed), sweep.png and, once all runs have ended, eval.json: the scores by run, with
mean and standard deviation over the seeds.
"""

import gc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from train_jax import completed_run, loop
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
from train_jax.sweep.report import Outcome, SweepFields

RUN_NAME = re.compile(r"\w[\w.=+-]*")
EXPECTED_FORM = "expected a tuple of pairs ('name', {'dotted.key': value})"
RESERVED = ("checkpoints", "tensorboard", "config.json", "eval.json", SWEEP_FILE, "sweep.md", "sweep.png")
MEASURED_X = ("trainable_parameters", "seconds", "peak_memory_bytes")  # in the eval.json of every run


class SweepRun(NamedTuple):
    """One run of a sweep; `config` has the overrides applied and no sweep."""

    name: str
    overrides: dict[str, Any]
    config: ConfigDict


def expand(config: ConfigDict) -> list[SweepRun]:
    """Returns the runs of a config's sweep, after validating the config of each.

    Raises:
      UserError: `config.sweep` has another form, two runs have the same name, a name is not valid for a folder, or an
        override has an unknown key or an invalid value.
    """
    validate(config, training=False)
    runs: dict[str, SweepRun] = {}
    for entry in config.sweep.runs:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)):
            raise UserError(
                f"config.sweep.runs holds {quoted(entry)}, {EXPECTED_FORM}: correct it (a tuple of one ends in a comma)"
            )
        name, overrides = entry
        if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
            raise UserError(
                f"config.sweep.runs names a run {quoted(name)}, expected letters, digits and _ . = + - (it becomes a "
                "folder): rename it"
            )
        if name in RESERVED:
            raise UserError(f"config.sweep.runs names a run {name!r}, which a workdir holds itself: rename it")
        if name in runs:
            raise UserError(f"config.sweep.runs has two runs named {name!r}, expected different names: rename one")
        runs[name] = SweepRun(name, dict(overrides), _overridden(config, name, overrides))
    if not runs:
        raise UserError(f"config.sweep.runs is empty, {EXPECTED_FORM}: add runs")
    _check_axes(config, list(runs.values()))
    return list(runs.values())


def _overridden(config: ConfigDict, name: str, overrides: Mapping[Any, Any]) -> ConfigDict:
    """Returns the config of one run.

    Overrides are applied as on the command line, where a duration in one unit replaces that in another unit.
    """
    run_config = from_json(to_json(config))
    run_config.sweep = config_dict(SweepKeys)
    try:
        for key in overrides:
            if not isinstance(key, str):
                raise UserError(f"found the key {quoted(key)}, expected the name of a config key: correct it")
            if key not in leaves(config):
                raise unknown_key(key, config)
            if key.startswith("sweep."):
                raise UserError(f"config.{key} cannot be overridden in a run, expected a key of the run: leave it out")
        command_line.override(run_config, {key: str(value) for key, value in overrides.items()})
        validate(run_config)
    except UserError as error:
        raise UserError(f"run {name!r} of config.sweep.runs: {error}") from error
    return run_config


def _check_axes(config: ConfigDict, runs: list[SweepRun]) -> None:
    """Checks that `sweep.series` names config keys, and `sweep.x` a numeric config key or a measured number."""
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
    """Trains and evaluates every run of the sweep that is not complete; returns the content of sweep.json.

    Args:
      config: a config whose `sweep.runs` is a tuple of ("name", {"dotted key": value}).
      workdir: folder of the sweep; the workdir of run `name` is `workdir/name`.
      progress: see loop.fit.
      began: time from which `seconds` of the first run is counted; None = now.

    Raises:
      UserError: before any training, if the sweep is invalid, `workdir` contains a single run, or a run in it was
        trained with other overrides; later as `loop.fit`, or if the results lack `sweep.metric` or one of `sweep.more`.
      RunStopped: after all runs, if some stopped at non-finite updates.
      SystemExit: as `loop.fit`; the same command resumes the sweep.
    """
    workdir = Path(workdir)
    runs = expand(config)
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a single run, expected a new folder or a sweep's: choose another --workdir")
    fields = SweepFields(
        config.sweep.metric or config.best_metric or "loss",
        config.sweep.x,
        config.sweep.series,
        tuple(config.sweep.more),
        tuple(config.sweep.curves),
    )
    outcomes = {
        run.name: Outcome(run.name, run.overrides, run.config, _completed_results(workdir, run)) for run in runs
    }
    if jax.process_index() == 0:
        files.write_atomically(workdir / "config.json", to_json(config))
    for number, run in enumerate(runs, 1):
        _write_summary(workdir, fields, outcomes)
        outcome = outcomes[run.name]
        if outcome.results is None:
            _print(f"[{number}/{len(runs)}] {run.name}: {sweep_report.describe(run.overrides)}")
            try:
                results = loop.fit(run.config, workdir / run.name, progress, began)
                outcomes[run.name] = outcome._replace(results=results)
            except RunStopped as error:
                _print(f"{run.name} stopped: {error}")
                outcomes[run.name] = outcome._replace(stopped=str(error))
            _free_memory()
        else:
            _print(f"[{number}/{len(runs)}] {run.name} is complete, see {workdir / run.name / 'eval.json'}.")
        began = None
        for name in (fields.metric, *fields.more):
            _check_metric(name, outcomes[run.name])
    summary = _write_summary(workdir, fields, outcomes)
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
            f"complete and in {workdir / 'sweep.md'}: change the overrides of the stopped runs and rename them."
        )
    return summary


def _completed_results(workdir: Path, run: SweepRun) -> dict[str, Any] | None:
    """Returns the results of a run if it is complete, else None.

    Raises:
      UserError: the folder contains a run with another config or other data.
    """
    try:
        existing = inspect_workdir(workdir / run.name, run.config)
        if existing and existing.results is not None:
            completed_run.check(run.config, workdir / run.name)
    except UserError as error:
        raise UserError(f"{workdir / run.name}: {error}") from error
    return existing.results if existing else None


def _check_metric(metric: str, outcome: Outcome) -> None:
    """Checks that a complete run has the metric; only its results show which metrics the task measures."""
    results = outcome.results
    if results is not None and metric not in results:
        names = [name for name, value in results.items() if type(value) in (int, float)]
        raise UserError(
            f"the sweep compares runs by {metric!r}, which {outcome.name}/eval.json does not hold, expected one of "
            f"{', '.join(names)}: set config.sweep.metric or config.sweep.more{did_you_mean(metric, names)}"
        )


def _write_summary(workdir: Path, fields: SweepFields, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Writes the current state to sweep.json and returns its content."""
    summary = files.plain(sweep_report.summarize(fields, list(outcomes.values())))
    if jax.process_index() == 0:
        files.write_atomically(workdir / SWEEP_FILE, files.to_json(summary, indent=2) + "\n")
    return summary


def _free_memory() -> None:
    """Frees the memory of the previous run: arrays in reference cycles, and the programs compiled for its shapes."""
    jax.clear_caches()
    gc.collect()


def _print(text: str) -> None:
    """Prints a line in the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)
