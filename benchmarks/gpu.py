"""The GPU suite: PaliGemma-3B with random weights, the sigmoid loss at 32,768 pairs and a U-Net.

Model FLOPs utilisation counts real tokens (paligemma_jax/metrics/model_flops.py) and divides by the dense bfloat16 peak
of an H100 or H200. Scenes are synthetic and weights random, so losses have no meaning; shapes and programs are those of
`configs/clevr.py:3b`, with a batch that fills the card and the lengths of CLEVR's rows.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import paligemma_jax as pg
from benchmarks import attention
from benchmarks.results import Measurement
from benchmarks.training import TrainingRun
from configs import clevr, flow_images
from paligemma_jax.losses import sigmoid_loss
from paligemma_jax.metrics.model_flops import FULL, LORA, model_flops
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.weights.reader import load
from train_jax.config.command_line import override
from train_jax.system.memory import reported_peak, step_memory

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}
GIB = 2**30
DATA = {
    "tokenizer": "tiny",
    "data.name": "synthetic_clevr",
    "data.fraction": 1.0,
    "data.num_train_scenes": 200,
    "data.num_validation_scenes": 10,
    "total_epochs": 10.0,
    "eval.controls": False,
}
FITTED = {"data.prefix_length": 48, "data.suffix_length": 16}  # the longest row of CLEVR takes 41 tokens
SMALL = {"model.path": "tiny", "data.num_train_scenes": 12, "data.num_validation_scenes": 4}


def peak_flops() -> float:
    """Returns the dense bfloat16 peak of this device; NaN if it is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), float("nan"))


def clevr_config(tiny: bool, argument: str, pixels: int = 224, **overrides) -> ConfigDict:
    """Returns `configs/clevr.py:argument` on random weights and synthetic scenes."""
    config = clevr.get_config(argument)
    keys = {"model.path": f"random:3b-{pixels}"} | DATA | overrides | (SMALL if tiny else {})
    override(config, {key: str(value) for key, value in keys.items()})
    return config


def training(tiny: bool, argument: str, batch: int, steps: int = 10, aim: str = "", **overrides) -> list[Measurement]:
    """Times the training step of a base: seconds, examples a second, MFU by real tokens, and peak memory."""
    batch, steps = (8, 2) if tiny else (batch, steps)
    config = clevr_config(tiny, argument, batch_size=batch, micro_batch=batch, **overrides)
    run = TrainingRun(config)
    seconds = run.seconds_a_step(steps)
    text = supervised = positions = 0
    for rows in run.batches(steps):
        inputs = rows["mask_input"][..., :-1]
        text, positions = text + inputs.sum() / steps, positions + inputs.size / steps
        supervised += (rows["mask_loss"][..., 1:] * rows["weight"][..., None]).sum() / steps
    sizes = run.placed.model().config
    assert isinstance(sizes, PaliGemmaConfig)
    passes = FULL if config.adapter.name == "none" else LORA
    flops = model_flops(sizes, batch, round(text), round(supervised), passes)
    image_tokens = batch * sizes.vision.grid**2
    return [
        Measurement("step", seconds, "s"),
        Measurement("examples", batch / seconds, "a second"),
        Measurement("MFU by real tokens", 100 * flops / seconds / peak_flops(), "%", aim),
        Measurement("real tokens", 100 * (text + image_tokens) / (positions + image_tokens), "%"),
        Measurement("peak memory", (reported_peak() or 0) / GIB, "GiB"),
        Measurement("compilation", run.compile_seconds, "s"),
    ]


def first_token(tiny: bool) -> list[Measurement]:
    """Times an image and a prompt to the first token, at batch 1."""
    model = load("tiny" if tiny else "random:3b-224", "bfloat16", param_dtype="bfloat16")
    size = model.config.vision.image_size
    image = np.zeros((1, size, size, 3), np.float32)
    tokens = np.full((1, 24), 5, np.int32)

    def once() -> None:
        np.asarray(pg.generate(model, image, tokens, max_new_tokens=1, eos_id=-1))

    return [Measurement("image to first token, batch 1", 1000 * median_seconds(once), "ms")]


def evaluation(tiny: bool) -> list[Measurement]:
    """Times an evaluation of 2,000 questions: generated answers and the loss, compilation included and not."""
    questions = 20 if tiny else 2000
    overrides = {"data.num_validation_scenes": 4 if tiny else 210, "eval.max_new_tokens": 4, "eval.batch_size": 64}
    config = clevr_config(tiny, "3b", **(FITTED | overrides))
    run = TrainingRun(config)
    task, model = run.task, run.model()
    source = task.split(task.default_split)
    measured = []
    for name in ("with compilation", "compiled"):
        began = time.perf_counter()
        answers = task.evaluation(model).answers(source, ("generate", "loss"))
        count = sum(1 for _ in itertools.islice(answers, questions))
        measured.append(Measurement(f"{count} questions, {name}", time.perf_counter() - began, "s"))
    return measured


def sigmoid(tiny: bool) -> list[Measurement]:
    """Times the chunked sigmoid loss and its gradient on unit embeddings [32768, 768] in bfloat16."""
    batch, chunk = (256, 64) if tiny else (32_768, 2_048)
    zimg, ztxt = jax.random.normal(jax.random.key(0), (2, batch, 768))
    unit = [(rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)).astype("bfloat16") for rows in (zimg, ztxt)]
    arguments = *unit, jnp.log(10.0), jnp.float32(-10.0)
    loss = functools.partial(sigmoid_loss, chunk_size=chunk)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments).compile()
    memory = step_memory(step)
    seconds = median_seconds(lambda: jax.block_until_ready(step(*arguments)), 20)
    return [
        Measurement("loss and gradient", 1000 * seconds, "ms", "at most 6.5"),
        Measurement("temporary memory", (0 if memory is None else memory.temp) / 2**20, "MiB", "at most 210"),
    ]


def unet(tiny: bool) -> list[Measurement]:
    """Times a training step of the U-Net for CIFAR-10 of Lipman et al. 2023 on made-up pictures."""
    config = flow_images.get_config("smoke" if tiny else "cifar10")
    if not tiny:
        overrides = {"data.name": "shapes", "data.folder": "None", "batch_size": 128, "total_steps": 1000}
        override(config, {key: str(value) for key, value in overrides.items()})
    run = TrainingRun(config)
    seconds = run.seconds_a_step(2 if tiny else 10)
    return [
        Measurement("step", seconds, "s"),
        Measurement("images", config.batch_size / seconds, "a second"),
        Measurement("peak memory", (reported_peak() or 0) / GIB, "GiB"),
    ]


def median_seconds(call, rounds: int = 10) -> float:
    """Returns the median time of a call that waits for its result, after two calls of warm-up."""
    seconds = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[2:]))


CASES = {
    "LoRA step": functools.partial(training, argument="3b", batch=64, aim="at least 50", **FITTED),
    "QLoRA step": functools.partial(training, argument="3b,qlora", batch=64, **FITTED),
    "int8 LoRA step": functools.partial(training, argument="3b,int8", batch=64, **FITTED),
    "first token": first_token,
    "sigmoid loss": sigmoid,
    "attention": attention.measure,
    "full step": functools.partial(training, argument="3b,full", batch=32, aim="at least 50", **FITTED),
    "LoRA step of 511 text positions": functools.partial(training, argument="3b", batch=16),
    "evaluation": evaluation,
    "U-Net step": unet,
    "LoRA step at 896 px": functools.partial(training, argument="3b", batch=4, **FITTED, pixels=896),
}
