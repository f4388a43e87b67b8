"""Checkpoints of a run: the latest and the best, saved in the background, restored on any number of devices.

Only this file and trees.py use Orbax (v0 `CheckpointManager`; v1 is not stable yet). Each step is a folder with these
items:

    params     flat dict of the trainable parameters, so that adapters can be loaded alone
    ema        the moving average of the parameters, if the run keeps one
    opt_state  optimizer state and the rest of the train state (guard, loss scale), flattened to paths here, so that
               Orbax does not need to restore named tuples
    meta       JSON with the `meta` and `metrics` passed to `save`

A folder gets its final name only once all its files are written, so a killed save does not damage earlier steps.
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

from train_jax.checkpoints import best_metric as best_metric_lib
from train_jax.checkpoints import metadata
from train_jax.checkpoints.trees import differences, flatten, restore_args, unflatten
from train_jax.core import files
from train_jax.core.errors import UserError
from train_jax.system import disk

ARRAY_ITEMS = ("params", "ema", "opt_state")
SHOWN_PATHS = 8  # most paths that an error lists


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`; `ema` is None unless requested."""

    params: dict[str, jax.Array]
    opt_state: Any
    ema: dict[str, jax.Array] | None


@dataclasses.dataclass
class _KeepStep(preservation_policy.PreservationPolicy):
    """Preserves the step that `choose()` returns, which may change over time."""

    choose: Callable[[], int | None]

    def should_preserve(self, checkpoints, *, context):
        """Returns for each checkpoint whether to preserve it."""
        del context
        step = self.choose()
        return [checkpoint.step == step for checkpoint in checkpoints]


def _not_read_only_warning(record: logging.LogRecord) -> bool:
    """A logging filter that drops Orbax's warning about a read-only folder, which is read-only on purpose."""
    return not str(record.msg).startswith("Given directory is read only")


class Checkpoints:
    """The `checkpoints/` folder of a run. Every process must call every method; the first writes the shared files."""

    def __init__(
        self, folder: str | Path, best_metric: str | None = None, best_mode: str = "max", read_only: bool = False
    ):
        """Opens the folder and removes the temporary files of killed saves.

        Args:
          folder: created if missing, unless `read_only`.
          best_metric: name in the `metrics` of `save` that chooses the best step; None keeps only the latest.
          best_mode: "max" or "min"; among equal steps the earliest is best, as for early stopping.
          read_only: for evaluation: writes nothing, so that the run may still be training.

        Raises:
          UserError: the mode is unknown, or `read_only` and there is no such folder.
        """
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode is '{best_mode}', expected 'max' or 'min'; correct it")
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(f"no checkpoints in {self.folder}, which does not exist; train first or correct the path")
        self._metric, self._mode, self._read_only = best_metric, best_mode, read_only
        # A full disk is reported once, as a UserError; Orbax's background threads would each log a traceback first.
        logging.getLogger("absl").addFilter(disk.is_other_than_full)
        logging.getLogger("absl").addFilter(_not_read_only_warning)
        self._bytes = 0  # size of the current save
        self._manager = self._open()
        self._scores = {step: self.score(self.read_metrics(step)) for step in self.all_steps()}

    def _open(self) -> ocp.CheckpointManager:
        """Returns a manager that keeps the latest step and the best one.

        Orbax's own `best_fn` with `max_to_keep` would delete the latest step if it is not among the best, and the
        progress of the run with it.
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
        handlers["meta"] = ocp.JsonCheckpointHandler(filename=metadata.META_FILE)
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    # Listing.

    def all_steps(self) -> list[int]:
        """Returns the steps that can be restored, ascending, including one that is still being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the latest step, or None if there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the best metric, or None if no step was saved with a finite one."""
        scored = [step for step in self.all_steps() if self._scores.get(step, -math.inf) > -math.inf]
        return max(scored, key=lambda step: (self._scores[step], -step), default=None)

    def score(self, metrics: Mapping[str, Any] | None) -> float:
        """Returns the score of an evaluation by the folder's `best_metric`, see best_metric.score."""
        return best_metric_lib.score(metrics, self._metric, self._mode)

    def resolve(self, which: str | int) -> int:
        """Returns the step for "best", "latest" or a number (as text or int).

        Raises:
          UserError: there is no such checkpoint; the message lists the existing ones.
        """
        steps = self.all_steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.folder}; train first or correct the path")
        by_name = {"best": self.best_step(), "latest": steps[-1]} | {str(step): step for step in steps}
        step = by_name.get(str(which))
        if step is None:
            reason = "no step was saved with an evaluation" if which == "best" else "there is no such step"
            raise UserError(
                f"checkpoint '{which}' not found in {self.folder}: {reason}; choose 'best', 'latest' or a step of "
                f"{', '.join(map(str, steps))}"
            )
        return step

    # Saving.

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        opt_state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        ema: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Copies the state from the devices and saves it in the background; deletes steps neither latest nor best.

        A step that exists already keeps its arrays (the same step of the same run has the same state). Its `meta` is
        replaced, and its `metrics` if given, as when an evaluation follows a save.

        Args:
          step: updates attempted so far.
          params: trainable parameters by path.
          opt_state: tree of the rest of the train state.
          meta: JSON values that `read_meta` returns.
          metrics: of an evaluation of this state, if there was one.
          ema: moving average of the parameters, if the run keeps one.

        Raises:
          UserError: the disk is full (in this save or in the previous one, which ran in the background), or
            `best_metric` is not among `metrics`.
        """
        score = self.score(metrics)
        if step in self.all_steps():
            self._annotate(step, meta, metrics, score)
            return
        trees = {"params": dict(params), "opt_state": flatten(opt_state)} | ({"ema": dict(ema)} if ema else {})
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(files.plain({"meta": meta, "metrics": metrics}))
        with self._explain_full_disk(step):
            self._scores[step] = score
            self._manager.save(step, args=ocp.args.Composite(**items))

    def _annotate(self, step: int, meta: Mapping, metrics: Mapping[str, Any] | None, score: float) -> None:
        """Replaces the JSON of an existing step."""
        self.wait()
        if metrics is None:
            metrics = self.read_metrics(step)
        else:
            self._scores[step] = score
        with self._explain_full_disk(step):
            if jax.process_index() == 0:
                path = metadata.meta_path(self.folder, step)
                files.write_atomically(path, files.to_json({"meta": meta, "metrics": metrics}))
            multihost_utils.sync_global_devices(f"meta of checkpoint {step}")

    def wait(self) -> None:
        """Blocks until the background save is complete.

        Raises:
          UserError: the disk is full.
        """
        with self._explain_full_disk(self.latest_step()):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the background save and releases its threads; without this call the last save may be lost.

        Raises:
          UserError: the disk is full.
        """
        with self._explain_full_disk(self.latest_step()):
            self._manager.close()

    # Restoring.

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` that was passed to `save`."""
        return self._read_metadata(step)["meta"]

    def read_metrics(self, step: int) -> dict[str, Any] | None:
        """Returns the `metrics` that were passed to `save`, or None."""
        return self._read_metadata(step)["metrics"]

    def restore(self, step: int, abstract_params: Mapping, abstract_opt_state: Any, abstract_ema=None) -> Restored:
        """Restores a step as arrays of the given shapes, dtypes and shardings; it may have been saved on another mesh.

        Args:
          step: one of `all_steps()`.
          abstract_params: flat dict of `jax.ShapeDtypeStruct` with `sharding`, or of arrays.
          abstract_opt_state: tree of the same leaves, whose structure the result has.
          abstract_ema: like `abstract_params`, to restore the moving average too.

        Raises:
          UserError: paths, shapes or dtypes differ from the saved ones; the message lists them.
        """
        abstract = {"params": dict(abstract_params), "opt_state": flatten(abstract_opt_state)}
        if abstract_ema is not None:
            abstract["ema"] = dict(abstract_ema)
        items = self._restore_items(step, abstract)
        opt_state = unflatten(items["opt_state"], abstract_opt_state)
        return Restored(items["params"], opt_state, items.get("ema"))

    def restore_params(self, step: int, abstract_params: Mapping | None = None, item: str = "params") -> dict[str, Any]:
        """Restores only the trainable parameters, such as adapters for evaluation.

        Args:
          step: one of `all_steps()`.
          abstract_params: as in `restore`; None returns numpy arrays as saved, on any number of devices.
          item: "params" or "ema".

        Raises:
          UserError: as `restore`, or the step holds no such item.
        """
        abstract = self._saved(step, item) if abstract_params is None else dict(abstract_params)
        return self._restore_items(step, {item: abstract})[item]

    def _restore_items(self, step: int, abstract: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Restores items as flat dicts of abstract arrays, after comparing all of them with the saved ones.

        If shapes or dtypes differ, Orbax itself pads, slices or casts without an error.
        """
        self.wait()
        differing = []
        for name, tree in abstract.items():
            differing += differences(self._saved(step, name), tree, name)
        if differing:
            more = f" and {len(differing) - SHOWN_PATHS} more" if len(differing) > SHOWN_PATHS else ""
            raise UserError(
                f"checkpoint {step} in {self.folder} does not fit this model and optimizer: "
                f"{', '.join(differing[:SHOWN_PATHS])}{more}; use the configuration that wrote it or another workdir"
            )
        arguments = {
            name: ocp.args.PyTreeRestore(tree, restore_args={path: restore_args(leaf) for path, leaf in tree.items()})
            for name, tree in abstract.items()
        }
        restored: Any = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: dict(restored[name]) for name in abstract}

    def _saved(self, step: int, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a saved item, without shardings."""
        self.wait()
        if not (self.folder / str(step) / item).is_dir():
            raise UserError(f"checkpoint {step} in {self.folder} holds no '{item}'; restore another item or step")
        saved: Any = self._manager.item_metadata(step)
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in dict(saved[item].tree).items()}

    def _read_metadata(self, step: int) -> dict[str, Any]:
        if step not in self.all_steps():
            self.resolve(step)  # raises an error that lists the existing steps
        self.wait()
        return metadata.read_metadata(self.folder, step)

    @contextlib.contextmanager
    def _explain_full_disk(self, step: int | None) -> Iterator[None]:
        """Turns a "no space left" error into a UserError and keeps the earlier steps usable."""
        try:
            yield
        except Exception as error:
            if not disk.is_full(error):
                raise
            # The manager has dropped the steps that this save was to replace from its list. The temporary folder of the
            # save stays, since other threads may still write there; the next run removes it.
            self._manager.reload()
            free = shutil.disk_usage(self.folder).free / 2**20
            raise UserError(
                f"no space for checkpoint {step} in {self.folder}: it takes about {self._bytes / 2**20:.1f} MiB and "
                f"{free:.1f} MiB are free, the last complete one is {self.latest_step()}; free space on that disk and "
                "run the same command to resume"
            ) from error
