"""Plans the memory, compute and communication of a run without running it.

    python -m train_jax.plan --config=configs/clevr.py:3b [--devices=8] [--tpu=v5e:4x4] [--mesh=data=2,fsdp=4]

The command compiles the training step and the programs of evaluation for abstract arrays. It reads no weights or data
and allocates nothing, so that a laptop can plan for a pod. It prints the memory, FLOPs and bytes of collectives of one
device, and which common accelerators have enough memory. `--devices` plans for that many CPU devices instead of the
available devices. `--tpu` compiles with the TPU compiler (the extra [tpu]), without a TPU, for a slice of that size,
and adds its estimate of the time by class of operation; `--profile` lists the most expensive source lines. Other
arguments are those of train.py. For a sweep it plans every run, but only one of runs that differ in their seed.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

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
from train_jax.plan import cost, flops, hlo
from train_jax.plan.report import Program, RunPlan, report
from train_jax.plan.tpu import DoesNotFitError, Slice, open_slice
from train_jax.step import placement, train_step
from train_jax.step.placement import PlacedModel
from train_jax.step.remat import compile_step
from train_jax.sweep import run as sweep
from train_jax.system.memory import free_device_memory, ran_out_of_memory, step_memory
from train_jax.task import Blueprint

OP_CLASSES = (("optimizer", r"train_jax/optim/|/optax/|train_state\.py:"),)
TRAINING = "training step"
NOMINAL_EXAMPLES = 1_000_000  # stands for the size of the data, which only affects the schedule


def plan(config: ConfigDict, tpu: Slice | None = None, only: Collection[str] | None = None) -> RunPlan:
    """Compiles the programs of a run and returns its plan.

    Args:
      config: of the run.
      tpu: the slice to compile for; None for the available devices.
      only: names of the programs to compile, TRAINING and those of the task's blueprint; None compiles all.

    Raises:
      UserError: the config is invalid, or the task has no `blueprint` (see task.py).
    """
    validate(config, device_count=None if tpu is None else len(tpu.devices))
    mesh = sharding.make_mesh(config.mesh, None if tpu is None else tpu.devices)
    blueprint = task_class(config.task).blueprint(config, mesh)
    task = blueprint.task
    placed = placement.abstract(blueprint.model, task.trainable(), task.sharding_rules(), mesh)
    device = mesh.devices.flat[0].device_kind
    compiler = _Compiler(mesh, tpu, (*OP_CLASSES, *task.op_classes))
    if task.trainable() is None:
        frozen = sharding.device_bytes(placed.frozen)
        programs = _evaluations(blueprint, placed, frozen, compiler, only)
        return RunPlan(device, dict(mesh.shape), 0, frozen, 0, 0, programs)
    steps = Durations.of(config, NOMINAL_EXAMPLES)
    schedule = optimizers.make_schedule(config.optimizer, steps.total, steps.warmup)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, placed.trainable)
    float16 = config.compute_dtype == "float16"
    start = placement.abstract_state(placed, optimizer, mesh, ema=config.ema_decay is not None, float16=float16)
    batch = batch_shapes(config, blueprint, mesh)
    state_bytes, programs, remat = sharding.device_bytes((start, placed.frozen)), [], None
    if only is None or TRAINING in only:
        held = state_bytes + sharding.device_bytes(batch)

        def compile(model: PlacedModel) -> Program:
            traced, totals = train_step.trace(
                config, task.loss, task.normalizer, mesh, model, optimizer, schedule, start, batch
            )
            return compiler.compile(TRAINING, traced, held + sharding.device_bytes(totals))

        step, remat = compile_step(placed, compile, lambda step: step.temp + step.output, lambda: compiler.free(held))
        programs = [step]
    programs += _evaluations(blueprint, placed, state_bytes, compiler, only)
    trainable = sharding.device_bytes(start.params)
    return RunPlan(
        device=device,
        mesh=dict(mesh.shape),
        trainable=trainable,
        frozen=sharding.device_bytes(placed.frozen),
        optimizer=sharding.device_bytes(start) - trainable,
        batch=sharding.device_bytes(batch),
        programs=programs,
        model_flops=None if blueprint.model_flops is None else blueprint.model_flops / mesh.size,
        remat=remat,
    )


class _Compiler(NamedTuple):
    """Compiles programs for a mesh, whose devices may be those of a TPU slice that does not exist here."""

    mesh: Mesh
    tpu: Slice | None
    op_classes: Sequence[tuple[str, str]]

    def free(self, held: int) -> int | None:
        """Returns the memory of a device beside `held` bytes; None if it is not reported."""
        memory = free_device_memory() if self.tpu is None else int(self.tpu.chip.memory)
        return None if memory is None else memory - held

    def compile(self, name: str, traced: jax.stages.Traced, held: int) -> Program:
        """Returns the plan of a program that runs while `held` bytes are in use. Raises DoesNotFitError."""
        if self.tpu is None:
            return program_of(name, traced.lower().compile(), held, self.mesh)
        try:
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise DoesNotFitError(name, self.tpu.chip, error) from error
        program = program_of(name, compiled, held, self.mesh)
        return program._replace(cost=cost.program_cost(compiled.as_text() or "", self.tpu.chip, self.op_classes))


def _evaluations(
    blueprint: Blueprint, placed: PlacedModel, state_bytes: int, compiler: _Compiler, only: Collection[str] | None
) -> list[Program]:
    """Returns the programs of an evaluation that runs while `state_bytes` are in use; `only` as of `plan`."""
    programs = []
    for name, (function, arguments) in blueprint.programs.items():
        if only is not None and name not in only:
            continue
        held = state_bytes + sharding.device_bytes(arguments)
        traced = _traced(placed, function, arguments, compiler.mesh)
        programs.append(compiler.compile(f"evaluation: {name}", traced, held))
    return programs


def batch_shapes(config: ConfigDict, blueprint: Blueprint, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a training batch [A, b, ...] with their shardings."""
    rows = config.micro_batch or config.batch_size
    leading = (config.batch_size // rows, rows)
    rows_split = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            (*leading, *leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=rows_split
        )
        for name, leaf in blueprint.example.items()
    }


def _traced(placed: PlacedModel, function, arguments: tuple, mesh: Mesh) -> jax.stages.Traced:
    def program(arrays, *arguments):
        return function(param_tree.merge(placed.graph, arrays), *arguments)

    return jax.jit(row_sharding.with_mesh(mesh, program)).trace(placed.trainable | placed.frozen, *arguments)


def program_of(name: str, compiled: jax.stages.Compiled, held: int, mesh: Mesh) -> Program:
    """Returns the memory, FLOPs and collectives of a compiled program on one device.

    Args:
      name: of the program, for the report.
      compiled: for `mesh`.
      held: bytes of arrays in memory while it runs.
      mesh: of the program.

    Raises:
      UserError: the backend does not report memory.
    """
    memory, platform = step_memory(compiled), mesh.devices.flat[0].platform
    if memory is None:
        raise UserError(f"this backend ({platform}) does not report memory: plan with --devices, on the CPU")
    module = hlo.parse(compiled.as_text() or "")
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
    flags.DEFINE_integer("devices", None, "plan for this many simulated CPU devices", 1, flag_values=values)
    flags.DEFINE_string("mesh", None, "sizes of the mesh, e.g. data=2,fsdp=4", flag_values=values)
    flags.DEFINE_string("tpu", None, "plan for a slice of TPUs, e.g. v5e:4x4 (the extra [tpu])", flag_values=values)
    flags.DEFINE_bool("profile", False, "with --tpu: list the most expensive source lines", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and prints the plans."""
    config, _, values = command_line.load_from_flags(argv, __doc__ or "", _flags)
    if values.mesh is not None:
        command_line.override(config, _mesh_overrides(values.mesh))
    if values.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", values.devices)
    if values.profile and values.tpu is None:
        raise UserError(
            "--profile is given without --tpu, whose compiler has the estimates: add --tpu=v5e:2x2 or the like"
        )
    if values.tpu is not None:
        jax.config.update("jax_platforms", "cpu")  # for computations during tracing
    tpu = None if values.tpu is None else open_slice(values.tpu)
    for name, single in runs(config):
        print(f"{name}\n" if name else "", end="")
        print(report(plan(single, tpu), values.profile), end="\n\n" if name else "\n", flush=True)


def _mesh_overrides(sizes: str) -> dict[str, str]:
    """Returns the overrides that a value of --mesh stands for, such as "data=2,fsdp=4".

    Raises:
      UserError: a part is no AXIS=NUMBER, or names an axis twice or one that there is not.
    """
    overrides: dict[str, str] = {}
    for size in sizes.split(","):
        axis, _, number = size.partition("=")
        if axis not in sharding.AXES or not re.fullmatch(r"-?\d+", number):
            raise UserError(
                f"--mesh has {size!r}, expected AXIS=NUMBER with an axis of {', '.join(sharding.AXES)}: write "
                "--mesh=data=2,fsdp=4 or the like"
            )
        if f"mesh.{axis}" in overrides:
            raise UserError(f"--mesh has {axis} twice, expected each axis once: leave one out")
        overrides[f"mesh.{axis}"] = number
    return overrides


def runs(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """Returns the (name, config) pairs to plan: the runs of a sweep up to their seed, else the config without a name.

    Raises:
      UserError: the sweep is invalid.
    """
    if not config.sweep.runs:
        return [("", config)]
    by_overrides: dict[tuple, tuple[str, ConfigDict]] = {}
    for run in sweep.expand(config):
        overrides = tuple(sorted((key, repr(value)) for key, value in run.overrides.items() if key != "seed"))
        by_overrides.setdefault(overrides, (run.name, run.config))
    return list(by_overrides.values())
