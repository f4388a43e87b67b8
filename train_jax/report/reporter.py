"""What a run tells while it trains: progress, `metrics.jsonl`, TensorBoard.

Only the primary process writes; the others may call everything. No method waits for the device or reads from it unless
it is given a device array.
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
    """Reports of one run into its workdir."""

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
          start_step: the step resumed from, 0 for a new run. Lines of later steps, which the interrupted run had
            written beyond its last checkpoint, are dropped, so that the file tells of every step once.
          examples_per_step: global batch size, for the examples per second; 0 leaves them out.
          progress: "bar", "plain" (one line per `write`), "none", or "auto": a bar on a terminal, else plain.

        Raises:
          UserError: another `progress`.
        """
        if progress not in PROGRESS:
            raise UserError(f"progress is '{progress}', expected one of {', '.join(PROGRESS)}; correct it")
        if progress == "auto":
            progress = "bar" if sys.stderr.isatty() else "plain"
        workdir = Path(workdir)
        self._is_primary = jax.process_index() == 0
        self._total_steps, self._examples_per_step = total_steps, examples_per_step
        self._clock = _Clock(start_step)
        self._plain, self._bar, self._board, self._metrics = False, None, None, None
        if not self._is_primary:
            return
        self._plain = progress == "plain"
        if progress == "bar":
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
        workdir.mkdir(parents=True, exist_ok=True)
        _keep_until(workdir / "metrics.jsonl", start_step)
        self._metrics = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        purge = start_step + 1 if start_step else 0  # TensorBoard's way to drop later steps of earlier files
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def say(self, text: str) -> None:
        """Prints text for the person who watches, without tearing the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_primary:
            print(text, flush=True)

    def tick(self, step: int) -> None:
        """Moves the bar to `step`; to be called after each step. The first call starts the clock of the rate."""
        self._clock.start(step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time inside (an evaluation, a save) out of the rate and of the time left."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock.skip(time.perf_counter() - began)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs metrics of a training interval that ends at `step`, with the rate since the last call, to all places.

        A non-finite value is null in `metrics.jsonl` (JSON has no NaN), and its name stands in the list `nonfinite`.
        """
        if not self._is_primary:
            return
        rate = self._clock.lap(step)
        speeds = {} if rate is None else {"steps_per_second": rate}
        if rate is not None and self._examples_per_step:
            speeds["examples_per_second"] = rate * self._examples_per_step
        numbers = self._log(step, dict(metrics) | speeds)
        text = _show({name: value for name, value in numbers.items() if name not in speeds})
        spoken = [f"{value:.3g} {name.replace('_per_second', '/s')}" for name, value in speeds.items()]
        if self._bar is not None:  # shows steps per second and the time left by itself
            self._bar.set_postfix_str(", ".join([text, *spoken[1:]]))
        elif self._plain:
            share = 100 * step / max(self._total_steps, 1)
            left = [f"{tqdm.format_interval((self._total_steps - step) / rate)} left"] if rate else []
            self.say("  ".join([f"step {step}/{self._total_steps} ({share:.0f} %)", text, *spoken, *left]))

    def write_validation(self, step: int, results: Mapping[str, Any]) -> None:
        """Logs the numbers of an evaluation during training as `eval/<name>`; nested dicts become longer names.

        The progress shows the top level alone.
        """
        if not self._is_primary:
            return
        flat = files.flatten(results, "eval")
        numbers = self._log(step, {name: value for name, value in flat.items() if _is_number(value)})
        if self._plain or self._bar is not None:
            top = {name: value for name, value in numbers.items() if name.count("/") == 1}
            self.say(f"step {step}/{self._total_steps}  {_show(top)}")

    def close(self) -> None:
        """Closes files and bar; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
            self._board.close()

    def _log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """One line of JSON and a TensorBoard point each; returns the metrics as Python numbers, NaN kept."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        record: dict[str, Any] = {"step": int(step)} | numbers
        nonfinite = [name for name, value in numbers.items() if not math.isfinite(value)]
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._metrics.write(files.to_json(record) + "\n")
        self._metrics.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        return numbers


class _Clock:
    """Steps per second between two laps, without the first step (which compiles) and without pauses."""

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


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps, a last line cut off by a kill, and with step 0 everything."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if 0 < step >= record["step"]:
            kept.append(line + "\n")
    files.write_atomically(path, "".join(kept))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | jax.Array) and not isinstance(value, bool)


def _show(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
