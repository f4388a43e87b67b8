"""Measures the Frechet distance of a finished run and writes it to fid.json in the workdir.

Usage: python -m flow_jax.fid runs/x --features=my_module:function [flags]

Samples are drawn in batches and only the moments of their features are kept, so 50,000 samples take the memory of one
batch. With features of the Inception network the result is FID; docs/flow.md has an example and lists the conventions
in which FIDs differ. The other flags are those of eval.py; any key of the run's config may be changed, such as
--config.data.folder.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from flow_jax.metrics.frechet import FrechetScore
from train_jax.config import command_line
from train_jax.config.base import task_class
from train_jax.core import files, row_sharding
from train_jax.core.errors import UserError
from train_jax.system import clock

EVAL_FLAGS = (
    "features", "num_samples", "reference", "reference_examples", "solver", "num_steps", "tolerance", "guidance",
    "batch_size", "seed",
)  # fmt: skip
"""Flags that abbreviate --config.eval.NAME, whose meaning is in docs/config.md."""
NUM_SAMPLES = 50_000


def fid(config: ConfigDict, workdir: str | Path, checkpoint: str | int = "best", began: float | None = None) -> dict:
    """Measures a run as its config's `eval` says and returns the content of `fid.json`.

    Raises:
      UserError: as `train_jax.loop.load_model`; or data are missing, or the features are not a function of images.
    """
    from flow_jax.tasks.image_flow_task import ImageFlowTask  # slow to import: after the arguments have been checked
    from train_jax.evaluate import load_model, print_results
    from train_jax.parallel.sharding import make_mesh
    from train_jax.task import make_task

    began = time.perf_counter() if began is None else began
    if not issubclass(task_class(config.task), ImageFlowTask):
        raise UserError(
            f"{workdir} is a run of {config.task}, expected one of flow_jax.tasks.images:ImageFlow or of another "
            "ImageFlowTask: name its workdir"
        )
    workdir, options = Path(workdir), config.eval
    number = options.num_samples or NUM_SAMPLES
    mesh = make_mesh(config.mesh)
    evaluation = cast(ImageFlowTask, make_task(config, mesh)).evaluation
    evaluation.features  # noqa: B018 (fails on an unknown name before the model is loaded)
    model = load_model(config, workdir, checkpoint)
    reference = evaluation.images(options.reference)
    with _progress_bar("real images", min(len(reference), options.reference_examples)) as bar:
        real = evaluation.moments(options.reference, bar.update)
    score = FrechetScore(evaluation.features, real)
    with _progress_bar("samples", number) as bar, row_sharding.use_mesh(mesh):
        nfe = evaluation.score(model, evaluation.labels(number), [score], bar.update)
    settings = {
        name: options[name] for name in EVAL_FLAGS if name not in ("num_samples", "reference_examples", "batch_size")
    }
    results: dict[str, Any] = score.results() | {"nfe": nfe, "samples": number, "real_images": real.count} | settings
    results |= {"checkpoint": checkpoint, "seconds": time.perf_counter() - began}
    if jax.process_index() == 0:
        files.write_atomically(workdir / "fid.json", files.to_json(results, indent=2) + "\n")
    print_results(results)
    return results


def _progress_bar(description: str, total: int) -> tqdm:
    """Returns a progress bar, shown only on a terminal."""
    return tqdm(desc=description, total=total, unit="image", dynamic_ncols=True, disable=None)


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    for name in EVAL_FLAGS:
        default = f"; {NUM_SAMPLES} if absent" if name == "num_samples" else ""
        flags.DEFINE_string(name, None, f"short for --config.eval.{name}{default}", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and measures the run; the workdir may be the first argument, without --workdir."""
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], f"--workdir={argv[1]}", *argv[2:]]
    config, workdir, values = command_line.load_from_flags(argv, __doc__ or "", _flags)
    overrides = {f"eval.{name}": str(values[name].value) for name in EVAL_FLAGS if values[name].value is not None}
    command_line.override(config, overrides)
    fid(config, workdir, values.checkpoint, clock.process_began())


if __name__ == "__main__":
    command_line.run(main)
