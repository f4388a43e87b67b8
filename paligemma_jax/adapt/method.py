"""The protocol of all methods that adapt a model: attach, detach, merge, trainable, export and load.

A method is a subclass of `Method`, whose fields are its options. peft/methods.py has those of a PaliGemma by name,
few_shot/methods.py has that of a dual encoder.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError, listed

Model = TypeVar("Model", bound=nnx.Module)
Arrays = Mapping[str, jax.Array | np.ndarray]
Axes = tuple[str | None, ...]


class ProjectionSplit(NamedTuple):
    """How the mesh splits the kernels [*layers, *inputs, *outputs] of some projections: an axis or None for each.

    Attributes:
      pattern: of the projections' paths.
      layers: (None,) for a stack of layers, () for a single kernel.
      inputs: axes that split the inputs.
      outputs: axes that split the outputs.
    """

    pattern: str
    layers: Axes
    inputs: Axes
    outputs: Axes

    @property
    def kernel(self) -> Axes:
        """The axes that split a kernel."""
        return self.layers + self.inputs + self.outputs


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC, Generic[Model]):
    """A method of adapting a model, with its options.

    Attributes:
      name: the method's name in a registry and in the files of an adapter.
      modules: classes of the modules that it attaches; () if it attaches none.
      keeps_base: whether the base's parameters stay what they are, so that `detach` is possible.
      noise_per_step: whether it draws noise once per training step, the same for all rows.
      in_peft_format: whether its files are those of the library peft.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[type[nnx.Module], ...]] = ()
    keeps_base: ClassVar[bool] = True
    noise_per_step: ClassVar[bool] = False
    in_peft_format: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def trainable(self) -> str:
        """Pattern of the parameters that train."""

    @classmethod
    def sharding_rules(cls, split: ProjectionSplit) -> tuple[tuple[str, Axes], ...]:
        """Returns (pattern, axes) for the arrays that the method adds to projections; others are on every device."""
        return ()

    @property
    def extra_inputs(self) -> int:
        """Number of inputs that the method puts before the text."""
        return 0

    @abc.abstractmethod
    def attach(self, model: Model, rngs: nnx.Rngs) -> Model:
        """Attaches the method with new parameters, in place; use the model returned.

        Raises:
          UserError: options that do not fit the model, or the method is attached already.
        """

    @classmethod
    @abc.abstractmethod
    def detach(cls, model: Model) -> Model:
        """Removes what was attached, in place, which leaves the base.

        Raises:
          UserError: the method does not keep the base.
        """

    @classmethod
    @abc.abstractmethod
    def merge(cls, model: Model) -> Model:
        """Makes a trained model a plain one with the same output, in place.

        Raises:
          UserError: no plain model computes what the method does.
        """

    @classmethod
    def is_attached(cls, model: nnx.Module) -> bool:
        """Returns whether a model has modules of the method; not known of a method that attaches none."""
        return any(isinstance(module, cls.modules) for _, module in nnx.iter_modules(model))

    def export(self, model: Model) -> dict[str, Any]:
        """Returns the trained arrays by path, without the base; see `load`."""
        arrays = param_tree.flatten(model)
        return {path: arrays[path] for path in patterns.select(self.trainable, arrays, what="adapters")}

    def load(self, model: Model, arrays: Arrays, source: str = "the adapter") -> Model:
        """Attaches the method to its base with arrays of `export`; use the model returned.

        Args:
          model: the base, changed in place.
          arrays: by path.
          source: where the arrays come from, for messages.

        Raises:
          UserError: as `attach`, or paths and shapes are not the model's (lists them).
        """
        model = self.attach(model, nnx.Rngs(0))
        leaves = param_tree.abstract(model)
        expected = {path: leaves[path].shape for path in patterns.select(self.trainable, leaves, what="adapters")}
        shapes = {path: array.shape for path, array in arrays.items()}
        wrong = [
            f"{shapes.get(path, 'nothing')} for {path} where the model has {expected.get(path, 'nothing')}"
            for path in sorted(expected | shapes)
            if expected.get(path) != shapes.get(path)
        ]
        if wrong:
            raise UserError(
                f"{source} has {listed(wrong)}: it is an adapter of another model; load it on its own base."
            )
        return param_tree.assign(model, {path: jnp.asarray(array) for path, array in arrays.items()})

    def loss_term(self, model: Model) -> jax.Array | float:
        """Returns what the method adds to a mean loss."""
        return 0.0

    def describe(self, model: Model) -> str:
        """Returns a line about the parameters that train."""
        arrays = param_tree.abstract(model)
        paths = patterns.select(self.trainable, arrays, what="adapters")
        number = sum(arrays[path].size for path in paths)
        return f"{self.name}: {number:,} parameters in {len(paths)} arrays, {paths[0]} the first"


def not_mergeable(part: str, reason: str) -> UserError:
    """Returns the error of a method that cannot be merged.

    Args:
      part: what it attaches, such as "a prefix".
      reason: why no plain model computes the same, as a clause.
    """
    return UserError(
        f"the model has {part}, which no plain model can hold, as {reason}: keep the run, or load its folder `adapter` "
        "on the base."
    )


def not_detachable(name: str) -> UserError:
    """Returns the error of a method that trains parameters of the base."""
    return UserError(f"{name} trains parameters of the base, so nothing can be detached: load the base again.")
