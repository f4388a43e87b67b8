"""Checkpoints of a run: latest and best, written in the background, restored onto any device count.

Orbax is known here and in trees.py alone (v0 `CheckpointManager`; v1 still moves). Each step is one folder
of separate items:

    params     flat dict of the trainable parameters, so that adapters load alone
    ema        the same tree averaged over steps, when the run keeps it
    opt_state  optimizer state and whatever else a step carries (guard, loss scale), flattened to paths by us: the
               caller's tree gives named tuples their type back, Orbax never has to
    meta       JSON: what `save` was given as `meta` and `metrics`

A folder appears under its final name only when everything in it is written, so a killed save leaves the earlier steps
as they were.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train_jax.checkpoints import best_metric as ranking
from train_jax.checkpoints import metadata as checkpoint_files
from train_jax.checkpoints.trees import differences, flatten, restore_args, unflatten
from train_jax.core import files
from train_jax.core.errors import UserError
from train_jax.system import disk

ARRAY_ITEMS = ("params", "ema", "opt_state")
SHOWN_PATHS = 8  # a mismatch of whole towers should still fit a screen


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns; `ema` is None unless it was asked for."""

    params: dict[str, jax.Array]
    opt_state: Any
    ema: dict[str, jax.Array] | None


@dataclasses.dataclass
class _KeepStep(preservation_policy.PreservationPolicy):
    """Preserves the step that `choose` names at the time of asking."""

    choose: Callable[[], int | None]

    def should_preserve(self, checkpoints, *, context):
        del context
        kept = self.choose()
        return [checkpoint.step == kept for checkpoint in checkpoints]


def _is_news(record: logging.LogRecord) -> bool:
    """A logging filter that holds back Orbax's warning that a folder is read only: it was opened so."""
    return not str(record.msg).startswith("Given directory is read only")


class Checkpoints:
    """The `checkpoints/` folder of a run. Every process calls every method; the primary one writes the shared files."""

    def __init__(
        self, folder: str | Path, best_metric: str | None = None, best_mode: str = "max", read_only: bool = False
    ):
        """Opens the folder and removes what killed saves left there.

        Args:
          folder: created if missing, unless `read_only`.
          best_metric: name in the `metrics` of `save` by which the best step is chosen; None keeps the latest alone.
          best_mode: "max" or "min"; of equal steps the earliest is best, as for early stopping.
          read_only: for evaluation: touches nothing, so that it may look at a run that is still training.

        Raises:
          UserError: unknown mode, or nothing to read.
        """
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode is '{best_mode}', expected 'max' or 'min'; correct it")
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(f"no checkpoints in {self.folder}, which does not exist; train first or correct the path")
        self._metric, self._mode, self._read_only = best_metric, best_mode, read_only
        # A full disk is told once, as a UserError; Orbax's background threads would log a traceback each before it.
        logging.getLogger("absl").addFilter(disk.is_other_than_full)
        logging.getLogger("absl").addFilter(_is_news)
        self._bytes = 0  # of the save under way
        self._manager = self._open()
        self._scores = {step: self.score(self.read_metrics(step)) for step in self.all_steps()}

    def _open(self) -> ocp.CheckpointManager:
        """A manager that keeps the latest step and the best one.

        Orbax's own `best_fn` with `max_to_keep` would drop the latest step when it is not among the best, and with it
        the progress of the run.
        """
        policies = [preservation_policy.LatestN(n=1), _KeepStep(self.best_step)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            create=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            cleanup_tmp_directories=not self._read_only,
        )
        handlers: dict[str, ocp.CheckpointHandler] = {name: ocp.PyTreeCheckpointHandler() for name in ARRAY_ITEMS}
        handlers["meta"] = ocp.JsonCheckpointHandler(filename=checkpoint_files.META_FILE)
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    # Which steps there are.

    def all_steps(self) -> list[int]:
        """Steps that can be restored, ascending; a step still being written counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The last step saved, None before the first."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric among those kept, None if none was saved with a finite one."""
        scored = [step for step in self.all_steps() if self._scores.get(step, -math.inf) > -math.inf]
        return max(scored, key=lambda step: (self._scores[step], -step), default=None)

    def score(self, metrics: Mapping[str, Any] | None) -> float:
        """How the folder's `best_metric` ranks an evaluation, see best_metric.score; raises as that."""
        return ranking.score(metrics, self._metric, self._mode)

    def resolve(self, which: str | int) -> int:
        """The step that "best", "latest" or a number (as text or int) means.

        Raises:
          UserError: no such checkpoint; the sentence lists those there are.
        """
        steps = self.all_steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.folder}; train first or correct the path")
        found = {"best": self.best_step(), "latest": steps[-1]} | {str(step): step for step in steps}
        step = found.get(str(which))
        if step is None:
            reason = "no step was saved with an evaluation" if which == "best" else "there is no such step"
            raise UserError(
                f"checkpoint '{which}' not found in {self.folder}: {reason}; choose 'best', 'latest' or a step of "
                f"{', '.join(map(str, steps))}"
            )
        return step

    # Writing.

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        opt_state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        ema: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Copies the state off the devices and writes it in the background; drops steps neither latest nor best.

        A step that is there already keeps its arrays (the same step of the same run has the same state); its `meta`
        is replaced, and its `metrics` too if given, as after an evaluation that followed the save.

        Raises:
          UserError: the disk is full (of this save or of the one before, which ran in the background), or
            `best_metric` is not among `metrics`.
        """
        score = self.score(metrics)
        if step in self.all_steps():
            self._annotate(step, meta, metrics, score)
            return
        trees = {"params": dict(params), "opt_state": flatten(opt_state)} | ({"ema": dict(ema)} if ema else {})
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(files.plain({"meta": meta, "metrics": metrics}))
        with self._explain_full_disk(step):
            self._scores[step] = score
            self._manager.save(step, args=ocp.args.Composite(**items))

    def _annotate(self, step: int, meta: Mapping, metrics: Mapping[str, Any] | None, score: float) -> None:
        """Replaces the small JSON of a step that is written."""
        self.wait()
        if metrics is None:
            metrics = self.read_metrics(step)
        else:
            self._scores[step] = score
        with self._explain_full_disk(step):
            if jax.process_index() == 0:
                path = checkpoint_files.meta_path(self.folder, step)
                files.write_atomically(path, files.to_json({"meta": meta, "metrics": metrics}))
            multihost_utils.sync_global_devices(f"meta of checkpoint {step}")

    def wait(self) -> None:
        """Blocks until the save in the background is complete.

        Raises:
          UserError: it met a full disk.
        """
        with self._explain_full_disk(self.latest_step()):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads; without it the last save may be missing.

        Raises:
          UserError: as `wait`.
        """
        with self._explain_full_disk(self.latest_step()):
            self._manager.close()

    # Reading.

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` that `save` was given."""
        return self._read_json(step)["meta"]

    def read_metrics(self, step: int) -> dict[str, Any] | None:
        """The `metrics` that `save` was given, None if it was given none."""
        return self._read_json(step)["metrics"]

    def restore(self, step: int, abstract_params: Mapping, abstract_opt_state: Any, abstract_ema=None) -> Restored:
        """Reads a step as arrays of the given shapes, dtypes and shardings, whatever mesh it was saved from.

        Args:
          step: one of `all_steps()`.
          abstract_params: flat dict of `jax.ShapeDtypeStruct` (with `sharding`) or arrays to take these from.
          abstract_opt_state: tree of the same; gives the result its structure.
          abstract_ema: as `abstract_params`, to restore the average too.

        Raises:
          UserError: paths, shapes or dtypes differ from what was saved; the sentence lists them.
        """
        wanted = {"params": dict(abstract_params), "opt_state": flatten(abstract_opt_state)}
        if abstract_ema is not None:
            wanted["ema"] = dict(abstract_ema)
        found = self._restore_items(step, wanted)
        opt_state = unflatten(found["opt_state"], abstract_opt_state)
        return Restored(found["params"], opt_state, found.get("ema"))

    def restore_params(self, step: int, abstract_params: Mapping | None = None, item: str = "params") -> dict[str, Any]:
        """Reads the trainable parameters alone, e.g. adapters for evaluation.

        Args:
          step: one of `all_steps()`.
          abstract_params: as in `restore`; None gives numpy arrays as saved, on any device count.
          item: "params" or "ema".

        Raises:
          UserError: as `restore`, or the step holds no such item.
        """
        wanted = self._saved(step, item) if abstract_params is None else dict(abstract_params)
        return self._restore_items(step, {item: wanted})[item]

    def _restore_items(self, step: int, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Restores flat dicts of abstract arrays, all compared before anything is read.

        Orbax itself would pad, cut or cast silently where shapes or dtypes differ.
        """
        self.wait()
        differing = []
        for name, tree in wanted.items():
            differing += differences(self._saved(step, name), tree, name)
        if differing:
            more = f" and {len(differing) - SHOWN_PATHS} more" if len(differing) > SHOWN_PATHS else ""
            raise UserError(
                f"checkpoint {step} in {self.folder} does not fit this model and optimizer: "
                f"{', '.join(differing[:SHOWN_PATHS])}{more}; use the configuration that wrote it or another workdir"
            )
        arguments = {
            name: ocp.args.PyTreeRestore(tree, restore_args={path: restore_args(leaf) for path, leaf in tree.items()})
            for name, tree in wanted.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: dict(restored[name]) for name in wanted}

    def _saved(self, step: int, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an item as it lies on disk, without a sharding."""
        self.wait()
        if not (self.folder / str(step) / item).is_dir():
            raise UserError(f"checkpoint {step} in {self.folder} holds no '{item}'; restore another item or step")
        metadata = self._manager.item_metadata(step)[item]
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in dict(metadata.tree).items()}

    def _read_json(self, step: int) -> dict[str, Any]:
        if step not in self.all_steps():
            self.resolve(step)  # raises with the steps there are
        self.wait()
        return checkpoint_files.read_json(self.folder, step)

    @contextlib.contextmanager
    def _explain_full_disk(self, step: int | None) -> Iterator[None]:
        """Turns "no space left" into one sentence and leaves the earlier steps usable."""
        try:
            yield
        except Exception as error:
            if not disk.is_full(error):
                raise
            # The manager has forgotten the steps that this save was to replace. What the save left in its temporary
            # folder stays, since other threads may still write there; the next run removes it when it opens.
            self._manager.reload()
            free = shutil.disk_usage(self.folder).free / 2**20
            raise UserError(
                f"no space for checkpoint {step} in {self.folder}: it takes about {self._bytes / 2**20:.1f} MiB and "
                f"{free:.1f} MiB are free, the last complete one is {self.latest_step()}; free space on that disk and "
                "run the same command to resume"
            ) from error
