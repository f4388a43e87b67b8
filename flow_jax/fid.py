"""The Frechet distance of a finished run: python -m flow_jax.fid runs/x --features=my_module:function [flags]

Draws samples in batches, in the order of their numbers, and keeps nothing but the moments of their features:
50,000 samples take the memory of one batch. With features of the Inception network this is FID; docs/flow.md
has an example, and says which conventions differ. Other flags are as of eval.py; any key of the run's config may be
changed, such as --config.data.folder. Writes fid.json into the workdir.
"""

import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from flow_jax.metrics.frechet import FrechetScore
from train_jax.config import command_line
from train_jax.config.base import leaves
from train_jax.core import files, row_sharding
from train_jax.core.errors import UserError
from train_jax.system import clock

# Flags that are short for --config.eval.<name>.
SHORT = {
    "features": "module:function of uint8 images [N, I, I, C] to float features [N, F], or pixels",
    "num_samples": "samples to draw; 50000 if absent",
    "reference": "real images to compare with: train or held_out",
    "reference_examples": "real images at most",
    "solver": "of the samples",
    "num_steps": "of a fixed solver",
    "tolerance": "of an adaptive solver",
    "guidance": "of classifier-free guidance",
    "batch_size": "samples at once",
    "seed": "of the noise",
}
NUM_SAMPLES = 50_000


def fid(config: ConfigDict, workdir: str | Path, checkpoint: str | int = "best", began: float | None = None) -> dict:
    """Measures a run by its config's `eval`; returns what `fid.json` holds.

    Raises:
      UserError: as `train_jax.loop.load_model`, data that are not there, features that are none.
    """
    from train_jax.evaluate import load_model, print_results  # slow to import: after mistakes have been told
    from train_jax.parallel.sharding import make_mesh
    from train_jax.task import make_task

    began = time.perf_counter() if began is None else began
    if "eval.reference_examples" not in leaves(config):
        raise UserError(f"{workdir} is a run of {config.task}, expected one of flow_jax.tasks.images:ImageFlow.")
    workdir, options = Path(workdir), config.eval
    number = options.num_samples or NUM_SAMPLES
    mesh = make_mesh(config.mesh)
    evaluation = make_task(config, mesh).evaluation
    evaluation.features  # noqa: B018 (a wrong name is told before the model is read)
    model = load_model(config, workdir, checkpoint)
    side = getattr(evaluation.data, options.reference)
    with _bar("real images", min(len(side), options.reference_examples)) as told:
        real = evaluation.moments(options.reference, told.update)
    score = FrechetScore(evaluation.features, real)
    with _bar("samples", number) as told, row_sharding.over(mesh):
        nfe = evaluation.score(model, evaluation.labels(number), [score], told.update)
    chosen = {name: options[name] for name in SHORT if name not in ("num_samples", "reference_examples", "batch_size")}
    results: dict[str, Any] = score.results() | {"nfe": nfe, "samples": number, "real_images": real.count} | chosen
    results |= {"checkpoint": checkpoint, "seconds": time.perf_counter() - began}
    if jax.process_index() == 0:
        files.write_atomically(workdir / "fid.json", files.to_json(results, indent=2) + "\n")
    print_results(results)
    return results


def _bar(what: str, total: int) -> tqdm:
    """A progress bar, on a terminal alone."""
    return tqdm(desc=what, total=total, unit="image", dynamic_ncols=True, disable=None)


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    for name, text in SHORT.items():
        flags.DEFINE_string(name, None, text, flag_values=values)


def main(argv: list[str]) -> None:
    """Parses the flags and measures; the workdir may stand first, without --workdir."""
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], f"--workdir={argv[1]}", *argv[2:]]
    config, workdir, values = command_line.load_from_flags(argv, __doc__, _flags)
    given = {f"eval.{name}": values[name].value for name in SHORT if values[name].value is not None}
    command_line.override(config, given)
    fid(config, workdir, values.checkpoint, clock.process_began())


if __name__ == "__main__":
    command_line.run(main)
