"""The training step, compiled once for each shape of a batch (train_jax/data/layout.py has few of them)."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from train_jax.step.placement import PlacedModel
from train_jax.step.remat import compile_step
from train_jax.system.memory import free_device_memory, least_of_processes, step_memory


class CompiledSteps:
    """Compiled steps by the shapes of their batch.

    Attributes:
      temp_bytes: most memory that one of them takes beside its arguments and results; None where it is not reported.
    """

    def __init__(
        self,
        trace: Callable[[PlacedModel, dict[str, Any]], jax.stages.Traced],
        model: PlacedModel,
        say: Callable[[str], object],
    ):
        """Compiles nothing yet.

        Args:
          trace: traces the step of a model for a batch on the mesh.
          model: to train.
          say: called with a line about every compilation but the first, and about a choice (see remat.py).
        """
        self._trace, self._model, self._say = trace, model, say
        self._steps: dict[tuple, jax.stages.Compiled] = {}
        self.temp_bytes: int | None = None

    def for_batch(self, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
        """Returns the step for batches of this one's shapes."""
        shapes = tuple((name, batch[name].shape) for name in sorted(batch))
        if shapes not in self._steps:
            began, others = time.perf_counter(), len(self._steps)
            self._steps[shapes] = compiled = self._compile(batch)
            memory = step_memory(compiled)
            if others:
                self._say(f"compiled the step for another shape of batches in {time.perf_counter() - began:.1f} s")
            if memory is not None:
                self.temp_bytes = max(memory.temp, self.temp_bytes or 0)
        return self._steps[shapes]

    def _compile(self, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
        def needed(compiled: jax.stages.Compiled) -> int | float:
            memory = step_memory(compiled)
            return math.inf if memory is None else memory.needed

        compiled, choice = compile_step(
            self._model,
            lambda model: self._trace(model, batch).lower().compile(),
            needed,
            lambda: least_of_processes(free_device_memory()),
        )
        if choice is not None:
            self._say(choice)
        return compiled
