"""Chooses what the backward pass recomputes, as little as the memory of the device allows.

It does so for modules with `config.remat == "auto"`, as the towers of paligemma_jax have.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from flax import nnx

from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.step.placement import PlacedModel
from train_jax.system.memory import format_bytes, ran_out_of_memory

AUTO = "auto"
LADDER = ("mlp", "block")
"""What "auto" stands for, from the fastest step to the one that needs the least memory. "none" is not among them: on a
TPU, PaliGemma's step takes longer with it than with "mlp", which recomputes less than "none" moves."""
SHARE = 0.9
"""Part of the free memory that a step may need; the rest is for fragments and what the compiler does not plan."""

C = TypeVar("C")


def compile_step(
    model: PlacedModel,
    compile: Callable[[PlacedModel], C],
    needed: Callable[[C], int | float],
    free: Callable[[], int | None],
) -> tuple[C, str | None]:
    """Compiles the training step, with the first value of LADDER that fits if the model leaves the choice.

    Args:
      model: whose step to compile.
      compile: compiles the step of a model.
      needed: returns the bytes that a compiled step needs beside its arguments.
      free: returns the bytes that are free beside the arguments, the same in every process; None if devices do not
        report them, which chooses the last value.

    Returns:
      The compiled step, and a sentence about the choice; None if the model leaves none.
    """
    if not any(_open_choices(model.model())):
        return compile(model), None
    left, last = free(), LADDER[-1]
    if left is None:
        return compile(with_remat(model, last)), f"model.remat=auto chooses {last}: devices report no memory"
    for remat in LADDER[:-1]:
        try:
            compiled = compile(with_remat(model, remat))
        except (jax.errors.JaxRuntimeError, UserError) as error:
            if not ran_out_of_memory(error):
                raise
            reason = f"with {remat} the step runs out of memory"
            continue
        reason = f"with {remat} the step needs {format_bytes(needed(compiled))} of {format_bytes(left)} free"
        if needed(compiled) <= SHARE * left:
            return compiled, f"model.remat=auto chooses {remat}: {reason}"
    return compile(with_remat(model, last)), f"model.remat=auto chooses {last}: {reason}"


def with_remat(model: PlacedModel, remat: str) -> PlacedModel:
    """Returns the model whose modules with remat="auto" have another value."""
    changed = model.model()
    for module in _open_choices(changed):
        module.config = dataclasses.replace(module.config, remat=remat)
    return dataclasses.replace(model, graph=param_tree.split(changed)[0])


def _open_choices(model: nnx.Module) -> Iterator:
    """Yields the modules that leave the choice."""
    for _, module in nnx.iter_modules(model):
        if getattr(getattr(module, "config", None), "remat", None) == AUTO:
            yield module
