"""Plans a run: python -m train_jax.plan --config=configs/clevr.py:3b [--devices=N] [--mesh=data=2,fsdp=4]

Compiles the training step and the programs of evaluation, as a run of this config would, on shapes alone: no weights
and no data are read and nothing is allocated, so that a laptop plans for a pod. Prints what each device holds, computes
and exchanges, and which common cards have the memory. `--devices` plans for that many (CPU) devices instead of those at
hand; further arguments are as of train.py. Of a sweep every run is planned, of several seeds the first.
"""

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.config import command_line
from train_jax.config.base import task_class
from train_jax.config.durations import Durations
from train_jax.config.validate import validate
from train_jax.core import param_tree, row_sharding
from train_jax.core.errors import UserError
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.plan import flops, hlo
from train_jax.plan.report import Program, RunPlan, report
from train_jax.step import placement, train_step
from train_jax.step.placement import PlacedModel
from train_jax.sweep import run as sweep
from train_jax.system.memory import step_memory
from train_jax.task import Blueprint

NOMINAL_EXAMPLES = 1_000_000  # data are not read; their number only moves the schedule, which takes no memory


def plan(config: ConfigDict) -> RunPlan:
    """Compiles all programs of a run on the devices at hand, over shapes.

    Raises:
      UserError: a config that cannot run, or a task that has no `blueprint` (see task.py).
    """
    validate(config)
    mesh = sharding.make_mesh(config.mesh)
    blueprint = task_class(config.task).blueprint(config, mesh)
    placed = placement.abstract(blueprint.task, blueprint.model, mesh)
    device = mesh.devices.flat[0].device_kind
    if blueprint.task.trainable() is None:
        frozen = sharding.device_bytes(placed.frozen)
        return RunPlan(device, dict(mesh.shape), 0, frozen, 0, 0, _evaluations(blueprint, placed, frozen, mesh))
    steps = Durations.of(config, NOMINAL_EXAMPLES)
    schedule = optimizers.make_schedule(config.optimizer, steps.total, steps.warmup)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, placed.trainable)
    float16 = config.compute_dtype == "float16"
    start = placement.abstract_state(placed, optimizer, mesh, ema=config.ema_decay is not None, float16=float16)
    batch = batch_shapes(config, blueprint, mesh)
    traced, totals = train_step.trace(config, blueprint.task, mesh, placed, optimizer, schedule, start, batch)
    state_bytes = sharding.device_bytes((start, placed.frozen))
    held = state_bytes + sharding.device_bytes((totals, batch))
    programs = [_compiled("training step", traced, held, mesh), *_evaluations(blueprint, placed, state_bytes, mesh)]
    trainable = sharding.device_bytes(start.params)
    return RunPlan(
        device=device,
        mesh=dict(mesh.shape),
        trainable=trainable,
        frozen=sharding.device_bytes(placed.frozen),
        optimizer=sharding.device_bytes(start) - trainable,
        batch=sharding.device_bytes(batch),
        programs=programs,
    )


def _evaluations(blueprint: Blueprint, placed: PlacedModel, state_bytes: int, mesh: Mesh) -> list[Program]:
    """The programs of an evaluation, beside a state of so many bytes."""
    programs = []
    for name, (function, arguments) in blueprint.programs.items():
        held = state_bytes + sharding.device_bytes(arguments)
        programs.append(_compiled(f"evaluation: {name}", _traced(placed, function, arguments, mesh), held, mesh))
    return programs


def batch_shapes(config: ConfigDict, blueprint: Blueprint, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch [A, b, ...] as the loop puts it on the mesh."""
    rows = config.micro_batch or config.batch_size
    leading = (config.batch_size // rows, rows)
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((*leading, *leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=place)
        for name, leaf in blueprint.example.items()
    }


def _traced(placed: PlacedModel, function, arguments: tuple, mesh: Mesh) -> jax.stages.Traced:
    def program(arrays, *arguments):
        return function(param_tree.merge(placed.graph, arrays), *arguments)

    return jax.jit(row_sharding.within(mesh, program)).trace(placed.trainable | placed.frozen, *arguments)


def _compiled(name: str, traced: jax.stages.Traced, held: int, mesh: Mesh) -> Program:
    return program_of(name, traced.lower().compile(), held, mesh)


def program_of(name: str, compiled: jax.stages.Compiled, held: int, mesh: Mesh) -> Program:
    """What a program compiled for a mesh takes on one device, beside `held` bytes of arrays.

    Raises:
      UserError: the backend does not tell.
    """
    memory, platform = step_memory(compiled), mesh.devices.flat[0].platform
    if memory is None:
        raise UserError(f"this backend ({platform}) tells no memory: plan with --devices, on the CPU")
    module = hlo.parse(compiled.as_text())
    copies = hlo.float32_copies(module) if platform == "cpu" else 0
    return Program(
        name,
        held,
        memory.temp,
        memory.output - memory.alias,
        min(copies, memory.temp),
        flops.product_flops(module),
        hlo.collective_bytes(module),
    )


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("devices", None, "plan for so many devices, made up on the CPU", 1, flag_values=values)
    flags.DEFINE_list("mesh", [], "sizes of the mesh, e.g. data=2,fsdp=4", flag_values=values)


def main(argv: list[str]) -> None:
    """Parses the flags, plans, prints."""
    config, _, values = command_line.load_from_flags(argv, __doc__, _flags)
    sizes = dict(size.partition("=")[::2] for size in values.mesh)
    command_line.override(config, {f"mesh.{axis}": size for axis, size in sizes.items()})
    if values.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", values.devices)
    for name, single in runs(config):
        print(f"{name}\n" if name else "", end="")
        print(report(plan(single)), end="\n\n" if name else "\n", flush=True)


def runs(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """The runs to plan, by name: those of a sweep, of several seeds the first; of any other config itself, nameless.

    Raises:
      UserError: a sweep that cannot be.
    """
    if not config.sweep:
        return [("", config)]
    found: dict[tuple, tuple[str, ConfigDict]] = {}
    for run in sweep.expand(config):
        overrides = tuple(sorted((key, repr(value)) for key, value in run.overrides.items() if key != "seed"))
        found.setdefault(overrides, (run.name, run.config))
    return list(found.values())
