"""Checks of programs partitioned over 8 devices: no activation is exchanged, compute and memory are divided.

Tests of the tasks check that values and gradients equal those of one device.
"""

import collections
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from tests.paligemma_jax.mini import config_of
from train_jax.config.base import task_class
from train_jax.core import param_tree, row_sharding
from train_jax.parallel import sharding
from train_jax.plan import flops, hlo, planning
from train_jax.system.memory import step_memory

ONE = {"data": 1, "fsdp": 1}
MESHES = {"data": {"data": 8, "fsdp": 1}, "fsdp": {"data": 1, "fsdp": 8}, "both": {"data": 2, "fsdp": 4}}
DEVICES = 8
Sizes = tuple[int, ...]  # sorted sizes of an array's axes, without 1s


class Case(NamedTuple):
    """A run to check.

    Attributes:
      config: file and argument.
      options: by dotted key; with enough rows that activations are larger than everything else.
      exchanged: arrays that its loss exchanges beside weights, gradients and metrics: embeddings, rows of a coupling.
      evaluates: whether to check the programs of evaluation too.
      passes: number of times that the training step gathers the weights: forward and backward, for each micro-batch.
    """

    config: str
    options: dict
    exchanged: tuple[Sizes, ...] = ()
    evaluates: bool = False
    passes: int = 2


class Divided(NamedTuple):
    """A program on one device: {(kind of collective, sizes): count}, FLOPs, and bytes of temporary memory."""

    exchanged: dict[tuple[str, Sizes], int]
    flops: int
    temp: int


def sizes(shape: Sizes) -> Sizes:
    return tuple(sorted(size for size in shape if size != 1))


def read(compiled: jax.stages.Compiled) -> Divided:
    module = hlo.parse(compiled.as_text())
    exchanged = collections.Counter()
    for (kind, type_), times in hlo.collectives(module).items():
        for shape, dtype in zip(hlo.shapes(type_), re.findall(r"(\w+)\[", type_), strict=True):
            # Every device looks up the embeddings of all tokens, and which of these are in the vocabulary.
            if kind != "all-gather" or dtype not in ("s32", "pred"):
                exchanged[kind, sizes(shape)] += times
    return Divided(exchanged, flops.product_flops(module), step_memory(compiled).temp)


def kept(mesh: jax.sharding.Mesh, loss: Callable, arguments: tuple) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of residuals of a loss's gradient in its first two arguments, on a mesh."""

    def forward(first, second, *rest):
        return jax.vjp(lambda first, second: loss(first, second, *rest), first, second)[1]

    return jax.tree.leaves(jax.eval_shape(row_sharding.with_mesh(mesh, forward), *arguments))


def programs(case: Case, mesh: dict[str, int], monkeypatch) -> dict[str, Divided]:
    """Returns the training step and the programs of evaluation, by name."""
    result, original = {}, planning.program_of

    def program_of(name, compiled, *rest):
        result[name] = read(compiled)
        return original(name, compiled, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(planning, "program_of", program_of)
        planning.plan(_config(case, mesh), only=None if case.evaluates else [planning.TRAINING])
    return result


def parameters(case: Case) -> dict[str, Sizes]:
    """Returns the shapes of a run's parameters by path."""
    config = _config(case, ONE)
    blueprint = task_class(config.task).blueprint(config, sharding.make_mesh(config.mesh))
    return {path: leaf.shape for path, leaf in param_tree.flatten(blueprint.model).items()}


def held_share(case: Case, mesh: str) -> float:
    """Returns the bytes of a device's parameters, relative to its equal part of all parameters."""
    config = _config(case, MESHES[mesh])
    devices = sharding.make_mesh(config.mesh)
    blueprint = task_class(config.task).blueprint(config, devices)
    shapes = param_tree.flatten(blueprint.model)
    places, _ = sharding.shardings(devices, blueprint.task.sharding_rules(), shapes)
    held = sum(math.prod(places[path].shard_shape(x.shape)) * x.dtype.itemsize for path, x in shapes.items())
    return held / sum(x.size * x.dtype.itemsize for x in shapes.values()) * DEVICES


def _config(case: Case, mesh: dict[str, int]):
    return config_of(case.options | {f"mesh.{axis}": size for axis, size in mesh.items()}, case.config)


def layers_of(shapes: dict[str, Sizes]) -> dict[str, list[Sizes]]:
    """Returns the arrays that are gathered together, by name: one layer of each stack, and arrays outside stacks."""
    result = collections.defaultdict(list)
    for path, shape in shapes.items():
        stack, in_stack, _ = path.partition("layers/")
        result[stack if in_stack else path].append(shape[1:] if in_stack else shape)
    return result


def check(case: Case, mesh: str, monkeypatch) -> None:
    """Asserts that exchanges, FLOPs and temporary memory of all programs of a run are divided over the devices.

    Temporary memory may hold the gathered weights of two layers and 1.2 times the device's share of the rest.
    """
    shapes = parameters(case)
    one, divided = (programs(case, shape, monkeypatch) for shape in (ONE, MESHES[mesh]))
    layers = layers_of(shapes)
    allowed = {sizes(shape) for layer in layers.values() for shape in layer} | set(map(sizes, shapes.values()))
    allowed |= {(), *case.exchanged}
    # On CPUs the gradient of a kernel is computed as a matrix.
    allowed |= {
        sizes((math.prod(shape[:axis]), math.prod(shape[axis:])))
        for layer in layers.values()
        for shape in layer
        for axis in range(1, len(shape))
    }
    # Embeddings of tokens, looked up where their columns are, and the gradient of their table.
    parts = MESHES[mesh]["fsdp"]
    tables = [shape for path, shape in shapes.items() if path.endswith("embedding") and len(shape) == 2]
    columns = {width // parts for _, width in tables} if parts > 1 else set()
    allowed |= {sizes((vocabulary, width // parts)) for vocabulary, width in tables}
    largest = sorted(sum(4 * math.prod(shape) for shape in layer) for layer in layers.values())[-2:]
    room = 0 if mesh == "data" else sum(largest)
    for name, whole in one.items():
        part = divided[name]
        looked_up = {key for key in part.exchanged if key[0] == "all-to-all" and columns.intersection(key[1])}
        unexpected = {
            key: times for key, times in part.exchanged.items() if key[1] not in allowed and key not in looked_up
        }
        assert not unexpected, f"{name} exchanges {unexpected}"
        work = part.flops / whole.flops * DEVICES
        assert work <= 1.05, f"{name} computes {work:.3f} of its share"
        share = (part.temp - room) / whole.temp * DEVICES
        assert share <= 1.2, f"{name} takes {share:.2f} of its share of {whole.temp} bytes"
        passes = case.passes if name == "training step" else 1
        if name == "evaluation: generated answers":  # the prompt, and every token
            passes = 1 + _config(case, ONE).eval.max_new_tokens
        assert sum(part.exchanged[key] for key in looked_up) <= passes * parts, f"{name} looks up too often"
        for key, number in arrays_of(shapes).items():
            assert part.exchanged["all-gather", key] <= passes * number, f"{name} gathers {key} too often"


def arrays_of(shapes: dict[str, Sizes]) -> dict[Sizes, int]:
    """Returns the number of arrays of each size that a pass gathers, over all layers."""
    result = collections.Counter()
    for path, shape in shapes.items():
        if "layers/" in path:
            result[sizes(shape[1:])] += shape[0]
        else:
            result[sizes(shape)] += 1
    return result
