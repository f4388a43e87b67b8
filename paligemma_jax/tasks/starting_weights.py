"""The base class of tasks whose runs start from weights in files, of which the workdir keeps digests."""

import abc
from collections.abc import Mapping
from pathlib import Path

from paligemma_jax.weights.fingerprint import check_digest, write_digest
from train_jax.task import Task


class StartsFromWeights(Task):
    """A task that writes digests of the weights that a run starts from, and refuses to continue it from others."""

    @abc.abstractmethod
    def starting_weights(self) -> Mapping[str, str | None]:
        """Returns the paths of these weights, or None, by the arguments of `fingerprint.write_digest`."""

    def check_workdir(self, workdir: Path) -> None:
        """Compares the weights that the run starts from with those recorded in the workdir.

        Raises:
          UserError: the workdir's run started from others.
        """
        check_digest(workdir, **self.starting_weights())

    def start(self, workdir: Path) -> None:
        """Writes the digests of the starting weights to the workdir."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_digest(workdir, **self.starting_weights())
