"""Reports of a run during training: progress, `metrics.jsonl` and TensorBoard.

All processes may call the methods; only the primary one writes. No method waits for the device unless it is passed a
device array.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from train_jax.core import files
from train_jax.core.errors import UserError

PROGRESS = ("auto", "bar", "plain", "none")


class Reporter:
    """Prints the progress of a run and logs its metrics in its workdir."""

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        start_step: int = 0,
        examples_per_step: int = 0,
        progress: str = "auto",
    ):
        """Opens the files; a run that resumes appends to them.

        Args:
          workdir: folder of the run, created if missing.
          total_steps: last step of the run.
          start_step: the step resumed from, 0 for a new run. Removes the lines of later steps, which an interrupted run
            wrote after its last checkpoint, so that the file has every step once.
          examples_per_step: global batch size, to report examples per second; 0 leaves them out.
          progress: "bar", "plain" (one line per `write`), "none", or "auto": a bar on a terminal, else plain.

        Raises:
          UserError: `progress` has another value.
        """
        if progress not in PROGRESS:
            raise UserError(f"progress is '{progress}', expected one of {', '.join(PROGRESS)}; correct it")
        if progress == "auto":
            progress = "bar" if sys.stderr.isatty() else "plain"
        workdir = Path(workdir)
        self._is_primary = jax.process_index() == 0
        self._total_steps, self._examples_per_step = total_steps, examples_per_step
        self._clock = _StepClock(start_step)
        self._plain = self._is_primary and progress == "plain"
        self._bar: tqdm | None = None
        self._files: _MetricFiles | None = None
        if not self._is_primary:
            return
        if progress == "bar":
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._files = _MetricFiles(workdir, start_step)

    def say(self, text: str) -> None:
        """Prints text without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_primary:
            print(text, flush=True)

    def tick(self, step: int) -> None:
        """Moves the progress bar to `step`. Call it after each step; the first call starts the clock of the rate."""
        self._clock.start(step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the context (an evaluation, a save) from the rate and the remaining time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock.skip(time.perf_counter() - began)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs the metrics of a training interval that ends at `step`, and the rate since the last call.

        A non-finite value is null in `metrics.jsonl` (JSON has no NaN), and its name is in the list `nonfinite`.
        """
        if self._files is None:
            return
        rate = self._clock.lap(step)
        speeds = {} if rate is None else {"steps_per_second": rate}
        if rate is not None and self._examples_per_step:
            speeds["examples_per_second"] = rate * self._examples_per_step
        numbers = self._files.log(step, dict(metrics) | speeds)
        text = _format({name: value for name, value in numbers.items() if name not in speeds})
        rates = [f"{value:.3g} {name.replace('_per_second', '/s')}" for name, value in speeds.items()]
        if self._bar is not None:  # which shows steps per second and the remaining time itself
            self._bar.set_postfix_str(", ".join([text, *rates[1:]]))
        elif self._plain:
            percent = 100 * step / max(self._total_steps, 1)
            left = [f"{tqdm.format_interval((self._total_steps - step) / rate)} left"] if rate else []
            self.say("  ".join([f"step {step}/{self._total_steps} ({percent:.0f} %)", text, *rates, *left]))

    def write_validation(self, step: int, results: Mapping[str, Any]) -> None:
        """Logs the numbers of an evaluation during training as `eval/<name>`; nested names are joined by "/".

        The progress shows only the top level.
        """
        if self._files is None:
            return
        flat = files.flatten(results, "eval")
        numbers = self._files.log(step, {name: value for name, value in flat.items() if _is_number(value)})
        if self._plain or self._bar is not None:
            top = {name: value for name, value in numbers.items() if name.count("/") == 1}
            self.say(f"step {step}/{self._total_steps}  {_format(top)}")

    def close(self) -> None:
        """Closes the files and the progress bar; can be called twice."""
        if self._bar is not None:
            self._bar.close()
        if self._files is not None:
            self._files.close()


class _MetricFiles:
    """`metrics.jsonl` and the TensorBoard files of a workdir."""

    def __init__(self, workdir: Path, start_step: int):
        workdir.mkdir(parents=True, exist_ok=True)
        _truncate_after(workdir / "metrics.jsonl", start_step)
        self._lines = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        purge_step = start_step + 1 if start_step else 0  # TensorBoard drops these steps of earlier files
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes a line of JSON and a TensorBoard point per metric; returns the metrics as Python numbers, with NaN."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        record: dict[str, Any] = {"step": int(step)} | numbers
        nonfinite = [name for name, value in numbers.items() if not math.isfinite(value)]
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._lines.write(files.to_json(record) + "\n")
        self._lines.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        return numbers

    def close(self) -> None:
        self._lines.close()
        self._board.close()


class _StepClock:
    """Measures steps per second between two laps, without the first step (which compiles) and pauses."""

    def __init__(self, step: int):
        self._step, self._time, self._running = step, time.perf_counter(), False

    def start(self, step: int) -> None:
        if not self._running:
            self._step, self._time, self._running = step, time.perf_counter(), True

    def skip(self, seconds: float) -> None:
        self._time += seconds

    def lap(self, step: int) -> float | None:
        now = time.perf_counter()
        steps, seconds = step - self._step, now - self._time
        self._step, self._time = step, now
        return steps / seconds if self._running and steps > 0 and seconds > 0 else None


def _truncate_after(path: Path, step: int) -> None:
    """Removes the lines of later steps and a line cut off by a kill; step 0 removes everything."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if 0 < step >= record["step"]:
            lines.append(line + "\n")
    files.write_atomically(path, "".join(lines))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | jax.Array) and not isinstance(value, bool)


def _format(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
