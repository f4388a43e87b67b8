"""The CPU suite: this project beside its peers on two threads, at the sizes of a model of 37.8 M parameters.

    python -m benchmarks --suite=cpu [--peers=PYTHON,PYTHON]

Each work of the model is done by processes in turns (paired.py), in float32 on a batch of 4 with 256 image and 64 text
tokens; "time over ours" is the median over rounds of the ratio of a peer's time to ours, which has unrolled layers. The
works themselves are in benchmarks/peers.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import clevr_config
from benchmarks.mid_size import write_base
from benchmarks.paired import Peer, Program, beside, measured
from benchmarks.peers import inputs
from benchmarks.results import Measurement, NotInstalledError
from benchmarks.training import TrainingRun
from paligemma_jax.data.sources.splits import open_source
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.tasks.common import progress

CONFIG = PaliGemmaConfig(
    vision=ViTConfig(image_size=224, patch_size=14, width=384, depth=6, mlp_dim=1536, num_heads=6),
    decoder=GemmaConfig(vocab_size=8192, width=512, depth=6, mlp_dim=2048, num_heads=8, head_dim=64),
    preprocessing=Preprocessing.siglip(224),
)
TINY = PaliGemmaConfig(
    vision=ViTConfig(image_size=28, patch_size=14, width=32, depth=2, mlp_dim=64, num_heads=2),
    decoder=GemmaConfig(vocab_size=1792, width=32, depth=2, mlp_dim=64, num_heads=2, head_dim=16),
    preprocessing=Preprocessing.siglip(28),
)
THREADS, ROUNDS = 2, 7
QUESTIONS_PER_SCENE = 4

OURS = Program("ours")
LOOP = Program("ours_scanned", same_weights=True)
TRANSFORMERS = Program("transformers_peft", ("torch", "transformers", "peft"), same_weights=True)
KERAS_HUB = Program("keras_hub", ("keras_hub", "jax"))
BIG_VISION = Program("big_vision", ("big_vision", "flax", "ml_collections", "optax"))


def peers(time: str = "", keras: bool = True, **more: Peer) -> dict[str, Peer]:
    """Returns the peers of a work by name; `time` is the aim beside transformers, whose memory should exceed ours."""
    found = {"transformers + peft": Peer(TRANSFORMERS, time, "at least 1"), **more}
    found |= {"KerasHub": Peer(KERAS_HUB)} if keras else {}
    return found | {"ours with layers as a loop": Peer(LOOP, "at most 1.1")}


WORKS = {
    "LoRA step": peers("at least 1.1"),
    "full step": peers("at least 1.1", big_vision=Peer(BIG_VISION, "at least 2")),
    "decoded token": peers("at least 1.5"),
    "first token": peers(),
    "evaluation": peers("at least 2", keras=False),
}


def beside_peers(tiny: bool, work: str) -> list[Measurement]:
    """Compares a work of ours with that of its peers."""
    use_threads()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), tiny)
        return beside(OURS, WORKS[work], Path(folder), work, 2 if tiny else ROUNDS)


def use_threads() -> None:
    """Binds this process and those that it starts to two cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def write_folder(folder: Path, tiny: bool) -> None:
    """Writes the model with random weights, and questions about synthetic scenes."""
    write_base(folder, TINY if tiny else CONFIG)
    scenes = {
        "data.cache_dir": folder / "scenes",
        "data.num_train_scenes": 2,  # the least
        "data.num_validation_scenes": 2 if tiny else 8,
        "data.questions_per_scene": QUESTIONS_PER_SCENE,
    }
    data = clevr_config(tiny=False, argument="", **scenes).data
    lines = []
    for record in open_source(data, data.validation_split, progress):
        (folder / record.image_name).write_bytes(record.image)
        lines.append(json.dumps({"image": record.image_name, "prefix": record.prefix, "suffix": record.suffix}))
    (folder / inputs.QUESTIONS).write_text("\n".join(lines))


def input_pipeline(tiny: bool) -> list[Measurement]:
    """Compares the batches that the main job's input pipeline makes with those that its step takes."""
    use_threads()
    run = TrainingRun(clevr_config(tiny, argument="", **{"model.path": "tiny", "data.num_train_scenes": 400}))
    steps, rounds = (2, 2) if tiny else (20, 9)
    batch, made, taken = run.batch(0), [], []
    run.take(batch)
    for _ in range(rounds):
        made.append(seconds_of(lambda: run.read(steps)) / steps)
        taken.append(seconds_of(lambda: [run.take(batch) for _ in range(steps)]) / steps)
    ratios = np.array(taken) / np.array(made)
    return [
        measured("a batch made", 1000 * np.array(made), "ms"),
        measured("a step", 1000 * np.array(taken), "ms"),
        measured("step over batch", ratios, "", "at least 5"),
    ]


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns the wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def flow_case(tiny: bool, name: str) -> list[Measurement]:
    """Compares 2D flow matching with torchcfm and torchdiffeq in one process, as benchmarks/flow.py does."""
    del tiny  # the models are small
    use_threads()
    try:
        from benchmarks import flow
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"{error.name} beside this project: the extra [bench]") from error
    return flow.measure(name)


BESIDE_PEERS = {work: functools.partial(beside_peers, work=work) for work in WORKS}
FLOWS = {
    "flow matching step beside torchcfm": functools.partial(flow_case, name="step"),
    "step with exact coupling beside torchcfm": functools.partial(flow_case, name="coupled"),
    "flow sampling beside torchdiffeq": functools.partial(flow_case, name="sample"),
}
COMPARED = BESIDE_PEERS | FLOWS
CASES = COMPARED | {"input pipeline": input_pipeline}
