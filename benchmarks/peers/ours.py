"""This project's program: the step of train.py, `pg.generate`, and the evaluation of VQA; layers are unrolled."""

import functools
from pathlib import Path

import numpy as np

import paligemma_jax as pg
from benchmarks.peers import inputs
from benchmarks.peers.turns import Work, serve
from benchmarks.training import TrainingRun
from paligemma_jax.data.sources.jsonl import JsonlRecords
from paligemma_jax.tasks.vqa import VQA
from paligemma_jax.tasks.vqa.answer_record import TokenLoss
from train_jax.config import base_config
from train_jax.config.command_line import override
from train_jax.core import row_sharding
from train_jax.core.data_source import ExampleList
from train_jax.parallel import sharding


def make_config(folder: Path, unroll: bool, **keys):
    """Returns the config of a run from the model of the folder."""
    config = base_config("paligemma_jax.tasks.vqa:VQA")
    keys |= {
        "model.path": folder,
        "model.unroll": unroll,
        "model.remat": "none",  # as the peers
        "mesh.data": 1,
        "batch_size": inputs.BATCH,
        "total_steps": 1000,
        **dict.fromkeys(("log_steps", "eval_steps", "checkpoint_steps"), 1000),
        "optimizer.learning_rate": inputs.RATE,
        "adapter.rank": inputs.RANK,
        "adapter.alpha": inputs.ALPHA,
        "adapter.dropout": 0.0,
    }
    override(config, {key: str(value) for key, value in keys.items()})
    return config


def examples(folder: Path) -> ExampleList:
    """Returns the rows of the batch, with a target after the last token that nothing supervises."""
    at = np.arange(inputs.TEXT + 1)
    masks = {
        "mask_ar": (at >= inputs.PROMPT).astype(np.int32),
        "mask_input": at < inputs.TEXT,
        "mask_loss": (at >= inputs.PROMPT) & (at < inputs.TEXT),
        "weight": np.float32(1),
    }
    rows = zip(inputs.images(folder), np.pad(inputs.tokens(), ((0, 0), (0, 1))), strict=True)
    return ExampleList([{"image": image, "tokens": tokens} | masks for image, tokens in rows])


def step(folder: Path, adapter: str, unroll: bool) -> Work:
    """Returns a training step with its guard and metrics, whose loss is read."""
    run = TrainingRun(make_config(folder, unroll, **{"adapter.name": adapter}), examples(folder))
    batch = run.batch(0)

    def once() -> float:
        total, steps = run.take(batch)["loss"]
        return float(total / steps)

    return Work(once)


def generate(folder: Path, unroll: bool, count: int) -> list[list[int]]:
    """Generates `count` tokens a row; compiles on the first call."""
    tokens = pg.generate(
        _model(folder, unroll), inputs.pixels(folder), inputs.tokens(), max_new_tokens=count, eos_id=-1
    )
    return np.asarray(tokens).tolist()


@functools.lru_cache(maxsize=1)
def _model(folder: Path, unroll: bool) -> pg.PaliGemma:
    model = pg.load(folder, unroll=unroll)
    assert isinstance(model, pg.PaliGemma)
    return model


def first_token(folder: Path, unroll: bool) -> Work:
    """Returns images and prompts to the first token."""
    return Work(lambda: generate(folder, unroll, 1))


def decoded_token(folder: Path, unroll: bool) -> Work:
    """Returns a later token of each row."""
    count = inputs.NEW_TOKENS
    return Work(lambda: generate(folder, unroll, count), lambda: generate(folder, unroll, 1), count - 1)


def evaluation(folder: Path, unroll: bool) -> Work:
    """Returns answers to all questions, and the mean loss of their references."""
    config = make_config(
        folder,
        unroll,
        **{
            "adapter.name": "none",
            "eval.batch_size": inputs.EVAL_BATCH,
            "eval.max_new_tokens": inputs.ANSWER_TOKENS,
        },
    )
    mesh = sharding.make_mesh(config.mesh)
    with row_sharding.use_mesh(mesh):
        task = VQA(config, mesh)
        model, records = task.init(), JsonlRecords(folder / inputs.QUESTIONS)

    def once() -> float:
        loss = TokenLoss()
        with row_sharding.use_mesh(mesh):
            for answer in task.evaluation(model).answers(records, ("generate", "loss")):
                loss.add(answer)
        return loss.mean

    return Work(once)


def works(unroll: bool) -> dict[str, functools.partial[Work]]:
    """Returns the works by name, with layers unrolled or as a loop."""
    return {
        "LoRA step": functools.partial(step, adapter="lora", unroll=unroll),
        "full step": functools.partial(step, adapter="none", unroll=unroll),
        "first token": functools.partial(first_token, unroll=unroll),
        "decoded token": functools.partial(decoded_token, unroll=unroll),
        "evaluation": functools.partial(evaluation, unroll=unroll),
    }


if __name__ == "__main__":
    serve(works(unroll=True))
