"""Plans of the toy task against its runs: live arrays, temporary and resident memory; planning allocates nothing."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from tests.live import live_arrays
from tests.train_jax.runs import CONFIG, ROOT
from tests.train_jax.toy_task import Toy, toy_config
from train_jax import loop
from train_jax.config import command_line
from train_jax.core.errors import UserError
from train_jax.plan import planning as plan_command
from train_jax.plan.hlo import COLLECTIVES
from train_jax.plan.planning import plan
from train_jax.plan.report import GB, cards_table, report
from train_jax.step import train_step
from train_jax.system.memory import format_bytes, step_memory

pytestmark = pytest.mark.usefixtures("fast_compilation")

VARIANTS = {
    "one device": {"mesh__data": 1},
    "2x2x2": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "micro_batch": 4},
    "average and float16": {"mesh__data": 1, "ema_decay": 0.9, "compute_dtype": "float16"},
    "half precision adam": {"mesh__data": 1, "optimizer__name": "adamw_8bit", "optimizer__min_8bit_size": 256},
}


def config(**changes):
    return toy_config(**{"model__width": 64, "total_steps": 1, "eval_steps": 1, "mesh__data": 1, **changes})


class StoppedError(Exception):
    """Raised once the step has been traced."""


@pytest.fixture
def real(monkeypatch, tmp_path):
    """Returns a function from config changes to (arguments of a run's first step, the traced step)."""

    def of(changes):
        seen, original = [], train_step.trace

        def traced(config, loss, normalizer, mesh, bundle, optimizer, schedule, start, batch):
            result, _ = original(config, loss, normalizer, mesh, bundle, optimizer, schedule, start, batch)
            seen.append(((start, bundle.frozen, batch), result))
            raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(train_step, "trace", traced)
            with pytest.raises(StoppedError):
                loop.fit(config(**changes), tmp_path / "run", "none")
        return seen[0]

    return of


def bytes_on_first_device(tree) -> int:
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_plan_equals_the_run(real, changes):
    """Live arrays to the byte, and temporary memory of the step; planning leaves no array on a device."""
    before = len(live_arrays())
    planned = plan(config(**changes))
    assert len(live_arrays()) == before
    (start, frozen, batch), traced = real(changes)
    assert planned.trainable == bytes_on_first_device(start.params)
    assert planned.frozen == bytes_on_first_device(frozen)
    assert planned.optimizer == bytes_on_first_device(start) - planned.trainable
    assert planned.batch == bytes_on_first_device(batch)
    step, memory = planned.programs[0], step_memory(traced.lower().compile())
    assert step.temp == memory.temp and step.output == memory.output - memory.alias
    assert memory.argument <= step.held  # a program drops arguments that it does not read


def test_nothing_is_allocated_while_planning(monkeypatch):
    """None of the 1.2 GB of its layers is allocated when a program is compiled."""
    held, original = [], plan_command.program_of

    def compiled(*arguments):
        held.append(sum(array.nbytes for array in live_arrays()))
        return original(*arguments)

    before = sum(array.nbytes for array in live_arrays())
    monkeypatch.setattr(plan_command, "program_of", compiled)
    planned = plan(config(model__width=12_288))
    assert planned.trainable > 1.2 * 10**9 and held == [before, before]


def test_flops_of_the_step():
    """Two layers, a head and a frozen tower that is not differentiated."""
    step, held_out = plan(config(model__dropout=0.0)).programs
    tower, layers, head = 2 * 8 * 64, 2 * 2 * 64 * 64, 2 * 64
    assert held_out.flops == 16 * (tower + layers + head)
    # The first layer's input is carried by the same scan; the gradient of the head's input is a product of vectors.
    assert step.flops == 8 * (tower + 3 * layers + 2 * head)


def test_collectives_of_data_parallelism_are_the_gradients():
    """Each device receives the sum of gradients, loss and metrics; a single device exchanges nothing."""
    assert plan(config()).programs[0].collectives == {}
    planned = plan(config(mesh__data=8))
    (result,) = planned.programs[0].collectives.items()
    assert result[0] == "all-reduce" and planned.trainable <= result[1] <= planned.trainable + 64


def test_the_report_has_every_number():
    planned = plan(config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    text = report(planned)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert f"trainable {format_bytes(planned.trainable)}" in lines["parameters"]
    for program in planned.programs:
        for number in (program.held, program.temp, program.total, *program.collectives.values()):
            assert format_bytes(number) in lines[program.name]
        assert f"{program.flops:.3g}" in lines[program.name]
    kinds = [kind for kind in COLLECTIVES if any(kind in program.collectives for program in planned.programs)]
    assert re.search(r"FLOPs +" + " +".join(kinds), text)


def test_cards_fit_or_do_not():
    planned = plan(config())
    step = planned.programs[0]._replace(held=10 * GB, temp=8 * GB, output=0, copies=4 * GB)
    rows = {line.split("  ")[0]: line for line in cards_table(planned._replace(programs=[step])).splitlines()}
    assert "yes, 3.73 GiB left" in rows["L4"]  # 4 GB
    assert "without the CPU's copies: 954 MiB left" in rows["T4"]  # 1 GB
    large = planned._replace(programs=[step._replace(held=12 * GB)])
    assert "no, 954 MiB too much" in cards_table(large) and large.peak == 20 * GB


def test_a_task_without_a_blueprint_is_refused(monkeypatch):
    monkeypatch.delattr(Toy, "blueprint")
    with pytest.raises(UserError, match="does not define blueprint, which the plan command needs: define it"):
        plan(config())


def test_every_run_of_a_sweep_is_planned_once():
    sweep = tuple((f"{width}-{seed}", {"model.width": width, "seed": seed}) for seed in (0, 1) for width in (8, 16))
    single = config()
    assert plan_command.runs(single) == [("", single)]
    result = plan_command.runs(config(sweep__runs=sweep))
    assert [(name, each.model.width) for name, each in result] == [("8-0", 8), ("16-0", 16)]
    assert all(each.sweep.runs == () for _, each in result)


# The command.


@pytest.fixture
def file(tmp_path):
    (tmp_path / "toy.py").write_text(CONFIG)
    return tmp_path / "toy.py"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--mesh=dat=2"],
            "--mesh has 'dat=2', expected AXIS=NUMBER with an axis of data, fsdp, tensor",
        ),
        (["--mesh=data"], "--mesh has 'data', expected AXIS=NUMBER"),
        (["--mesh=data=x"], "--mesh has 'data=x', expected AXIS=NUMBER"),
        (["--mesh="], "--mesh has '', expected AXIS=NUMBER"),
        (["--mesh=data=1,data=2"], "--mesh has data twice, expected each axis once: leave one out"),
        (["--tpu="], "--tpu is empty, expected a topology: write --tpu=v5e:4x4 or the like"),
        (["--mesh=data=3"], "config.batch_size=8 does not divide over the mesh's data=3"),
        (["--devices=0"], "correct the flag"),
    ],
)
def test_errors_of_the_command(file, capsys, flags, sentence):
    with pytest.raises(SystemExit):
        command_line.run(plan_command.main, ["plan", f"--config={file}", *flags])
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def run(*command, **environment) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": ""} | environment
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_devices_are_simulated(file):
    text = run(
        "-m", "train_jax.plan", f"--config={file}", "--devices=6", "--mesh=fsdp=2,tensor=3", "--config.batch_size=6"
    )
    assert "mesh data=1 x fsdp=2 x tensor=3" in text and re.search(r"^T4 +15 GB +yes", text, re.MULTILINE)


RESIDENT = """
import json, re, sys
import jax, jax.numpy as jnp
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.plan import planning as plan
from train_jax.step import placement, train_step
from tests.train_jax.toy_task import toy_config

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

config = toy_config(mesh__data=1, model__width=2048, model__dropout=0.0, batch_size=2048, total_steps=2)
planned = plan.plan(config)
mesh = sharding.make_mesh(config.mesh)
blueprint = __import__("tests.train_jax.toy_task", fromlist=["Toy"]).Toy.blueprint(config, mesh)
task = blueprint.task
placed = placement.abstract(blueprint.model, task.trainable(), task.sharding_rules(), mesh)
schedule = optimizers.make_schedule(config.optimizer, 2, 0)
optimizer = optimizers.make_optimizer(config.optimizer, schedule, placed.trainable)
start = placement.abstract_state(placed, optimizer, mesh, ema=False, float16=False)
batch = plan.batch_shapes(config, blueprint, mesh)
traced, totals = train_step.trace(config, task.loss, task.normalizer, mesh, placed, optimizer, schedule, start, batch)
step = traced.lower().compile()
fill = lambda leaf: jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here on
before = peak()
state, totals, frozen, batch = jax.tree.map(fill, (start, totals, placed.frozen, batch))
for _ in range(2):
    state, totals = jax.block_until_ready(step(state, totals, frozen, batch))
print(json.dumps({"planned": planned.programs[0].total, "resident": peak() - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset a peak")
def test_resident_memory_equals_the_plan():
    result = json.loads(run("-c", RESIDENT, JAX_PLATFORMS="cpu").splitlines()[-1])
    assert result["planned"] > 200e6
    assert result["resident"] == pytest.approx(result["planned"], rel=0.15)


def test_a_profile_without_a_tpu_is_refused():
    with pytest.raises(UserError, match="^--profile is given without --tpu, whose compiler has the estimates: add "):
        plan_command.main(["plan", f"--config={ROOT}/configs/flow_2d.py", "--profile"])
