"""The training step, compiled once for each shape of a batch (train_jax/data/layout.py has few of them)."""

import time
from collections.abc import Callable
from typing import Any

import jax

from train_jax.system.memory import step_memory


class CompiledSteps:
    """Compiled steps by the shapes of their batch.

    Attributes:
      temp_bytes: most memory that one of them takes beside its arguments and results; None where it is not reported.
    """

    def __init__(self, trace: Callable[[dict[str, Any]], jax.stages.Traced], say: Callable[[str], object]):
        """Compiles nothing yet.

        Args:
          trace: traces the step for a batch on the mesh.
          say: called with a line about every compilation but the first.
        """
        self._trace, self._say = trace, say
        self._steps: dict[tuple, jax.stages.Compiled] = {}
        self.temp_bytes: int | None = None

    def for_batch(self, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
        """Returns the step for batches of this one's shapes."""
        shapes = tuple((name, batch[name].shape) for name in sorted(batch))
        if shapes not in self._steps:
            began, others = time.perf_counter(), len(self._steps)
            self._steps[shapes] = compiled = self._trace(batch).lower().compile()
            memory = step_memory(compiled)
            if others:
                self._say(f"compiled the step for another shape of batches in {time.perf_counter() - began:.1f} s")
            if memory is not None:
                self.temp_bytes = max(memory.temp, self.temp_bytes or 0)
        return self._steps[shapes]
