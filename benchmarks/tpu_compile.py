"""The TPU suite: programs compiled for slices of TPUs, which need not exist (the extra [tpu]); nothing runs.

Memory and collectives are those of the compiler, times its estimate with our count of Pallas kernels (docs/plan.md).
Steps of PaliGemma are those of `configs/clevr.py:3b`, with rows of 256 image and 511 text positions. Where the axis
fsdp is used, it splits the weights over all chips.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from benchmarks.results import Measurement
from configs import clevr, siglip
from paligemma_jax.losses import sigmoid_loss
from train_jax.config.command_line import override
from train_jax.core import row_sharding
from train_jax.parallel import sharding
from train_jax.plan import cost, planning
from train_jax.plan.tpu import DoesNotFitError, open_slice
from train_jax.system.memory import step_memory

GIB = 2**30
SLICES = {1: "v5e:1x1", 4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
"""Topologies by their number of chips."""
MODELS = {"3B": "3b", "10B": "pg2-10b", "28B": "pg2-28b"}
METHODS = {"LoRA": "3b", "QLoRA": "3b,qlora", "full": "3b,full"}
"""Arguments of configs/clevr.py."""


def clevr_config(argument: str, model: str, rows: int, chips: int, axis: str = "fsdp", **keys) -> ConfigDict:
    """Returns `configs/clevr.py:argument` on random weights, with some rows a chip."""
    config = clevr.get_config(argument)
    batch = rows * chips
    sizes = {"model.path": model, "batch_size": batch, "micro_batch": batch, f"mesh.{axis}": chips}
    override(config, {key: str(value) for key, value in (sizes | keys).items()})
    return config


def training(
    tiny: bool,
    model: str,
    argument: str,
    chips: int,
    rows: int = 2,
    axis: str = "fsdp",
    aims: dict[str, str] | None = None,
    **keys,
) -> list[Measurement]:
    """Compiles a training step: memory of a chip, estimated time, collectives and model FLOPs utilisation."""
    aims, topology = aims or {}, SLICES[4 if tiny else chips]
    config = clevr_config(argument, "tiny" if tiny else f"random:{model}-224", rows, 4 if tiny else chips, axis, **keys)
    try:
        plan = planning.plan(config, open_slice(topology), only=[planning.TRAINING])
    except DoesNotFitError as error:
        return [Measurement("memory", error.needed, "GiB", "at most 14.9")]
    step, flops = plan.programs[0], plan.model_flops
    assert step.cost is not None and flops is not None
    seconds = max(step.cost.seconds, step.cost.collective_seconds)
    return [
        Measurement("memory", step.total / GIB, "GiB", "at most 14.9"),
        Measurement("of it temporary", step.temp / GIB, "GiB", aims.get("temporary", "")),
        Measurement("time", 1000 * step.cost.seconds, "ms"),
        Measurement("cycles", step.cost.seconds * step.cost.chip.clock, "", aims.get("cycles", "")),
        Measurement("without Pallas kernels", 1000 * step.cost.compiler_seconds, "ms"),
        Measurement("collectives", 1000 * step.cost.collective_seconds, "ms"),
        Measurement("MFU", 100 * flops / seconds / step.cost.chip.flops, "%", aims.get("MFU", "")),
    ]


def decoding(tiny: bool, argument: str, batch: int, aim: str) -> list[Measurement]:
    """Compiles generation on one chip: milliseconds a token, from answers of 65 tokens and of one."""
    seconds = []
    for tokens in (65, 1):
        keys = {"eval.batch_size": batch, "eval.max_new_tokens": tokens, "data.prefix_length": 32}
        config = clevr_config(argument, "tiny" if tiny else "random:3b-224", 1, 1, "data", **keys)
        plan = planning.plan(config, open_slice(SLICES[1]), only=["generated answers"])
        assert plan.programs[0].cost is not None
        seconds.append(plan.programs[0].cost.seconds)
    return [Measurement("a token", 1000 * (seconds[0] - seconds[1]) / 64, "ms", aim)]


def contrastive(tiny: bool) -> list[Measurement]:
    """Compiles the step of SigLIP B/16 at 32,768 pairs on 32 cores of v4."""
    config = siglip.get_config("smoke" if tiny else "b16")
    keys = {"mesh.data": 32, "tokenizer": "tiny"} if not tiny else {"mesh.data": 32, "batch_size": 32}
    override(config, {key: str(value) for key, value in keys.items()})
    step = planning.plan(config, open_slice("v4:2x2x4"), only=[planning.TRAINING]).programs[0]
    assert step.cost is not None
    return [
        Measurement("cycles", step.cost.seconds * step.cost.chip.clock, "", "at most 3.5e9"),
        Measurement("memory", step.total / GIB, "GiB", "at most 16"),
    ]


def loss(tiny: bool) -> list[Measurement]:
    """Compiles the sigmoid loss and its gradient of 2^20 pairs of width 768 over 16 chips of v5e."""
    batch, width = 1 << (12 if tiny else 20), 768
    tpu = open_slice(SLICES[16])
    mesh = sharding.make_mesh({"data": 16, "fsdp": 1, "tensor": 1}, tpu.devices)
    rows = NamedSharding(mesh, PartitionSpec(row_sharding.ROW_AXES))
    embeddings = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    around_ring = functools.partial(sigmoid_loss, mesh=mesh, axis=row_sharding.ROW_AXES)
    function = jax.value_and_grad(around_ring, argnums=(0, 1, 2, 3))
    traced = jax.jit(row_sharding.with_mesh(mesh, function)).trace(embeddings, embeddings, scalar, scalar)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = step_memory(compiled)
    assert memory is not None
    seconds = cost.program_cost(compiled.as_text() or "", tpu.chip, ()).seconds
    products = 3 * 2 * batch**2 * width / 16 / tpu.chip.flops
    return [
        Measurement("time", 1000 * seconds, "ms"),
        Measurement("over that of its three products", seconds / products, "", "at most 1.3"),
        Measurement("memory", (memory.temp + memory.output) / GIB, "GiB", "at most 16"),
    ]


LORA, FULL = METHODS["LoRA"], METHODS["full"]
BLOCK = {"model.remat": "block"}  # the least memory, for targets of memory and of time against it
TARGETS = {
    "LoRA step of 2 rows a chip": functools.partial(
        training, model="3b", argument=LORA, chips=4, axis="data", aims={"cycles": "at most 1.9e8"}
    ),
    "LoRA step of CLEVR's lengths": functools.partial(
        training, model="3b", argument=LORA, chips=4, axis="data", **{"data.prefix_length": 41, "data.suffix_length": 8}
    ),
    "LoRA step with blocks recomputed": functools.partial(
        training, model="3b", argument=LORA, chips=4, axis="data", **BLOCK
    ),
    "LoRA step with fsdp=16": functools.partial(
        training, model="3b", argument=LORA, chips=16, aims={"temporary": "at most 1.5"}, **BLOCK
    ),
    "LoRA step with fsdp=256": functools.partial(training, model="3b", argument=LORA, chips=256, **BLOCK),
    "QLoRA step": functools.partial(training, model="3b", argument=METHODS["QLoRA"], chips=4, axis="data"),
    "int8 LoRA step": functools.partial(training, model="3b", argument="3b,int8", chips=4, axis="data"),
    "full step of 4 rows a chip with fsdp=16": functools.partial(
        training, model="3b", argument=FULL, chips=16, rows=4, aims={"MFU": "at least 50"}
    ),
    "SigLIP B/16 step": contrastive,
    "sigmoid loss": loss,
    "decoding at batch 1": functools.partial(decoding, argument=LORA, batch=1, aim="at most 7.9"),
    "decoding at batch 16": functools.partial(decoding, argument=LORA, batch=16, aim="at most 8.1"),
    "decoding NF4 at batch 1": functools.partial(decoding, argument=METHODS["QLoRA"], batch=1, aim="at most 5.4"),
}
SIZES = {
    f"{model} {method} on {chips} chip{'s' if chips > 1 else ''}": functools.partial(
        training, model=path, argument=argument, chips=chips
    )
    for model, path in MODELS.items()
    for method, argument in METHODS.items()
    for chips in SLICES
}
