"""What several tasks share: keys of models, sharding rules of parameters, rows on the mesh, a progress bar."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from paligemma_jax.adapt.method import ProjectionSplit
from paligemma_jax.adapt.peft.methods import METHODS
from paligemma_jax.adapt.quantization import quantize
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.models.attention import KERNELS
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.stack import REMAT_POLICIES
from train_jax.core.config_keys import key
from train_jax.parallel import sharding
from train_jax.parallel.sharding import Spec

REMAT = ("none", *REMAT_POLICIES)
"""Values of the config key model.remat, see models.stack.scan_stack."""


@dataclasses.dataclass(frozen=True)
class StackKeys:
    """Keys of `config.model` of every transformer; a task may have other defaults."""

    remat: str = key(
        "none",
        "what the backward pass recomputes: nothing, whole blocks, all but matrix products, or all but the products "
        "before an MLP's activation; auto = mlp if that fits the device, else block (docs/memory.md)",
        choices=REMAT,
        resume_safe=True,
    )
    unroll: bool = key(
        False,
        "whether layers are compiled one by one instead of as a loop; steps are faster on a CPU, compiling is slower",
        resume_safe=True,
    )
    attention: str = key(
        "auto",
        "kernel of attention: plain, or flash, which holds no matrix of scores; auto = flash on TPUs from 512 "
        "tokens on, plain elsewhere (docs/attention.md)",
        choices=KERNELS,
        resume_safe=True,
    )


@dataclasses.dataclass(frozen=True)
class FeatureCacheKeys:
    """Keys of a task that can train on features of a frozen tower."""

    cache_features: bool = key(
        False,
        "whether each training image is encoded once and its features are kept in memory, which is exact while the "
        "tower is frozen",
        resume_safe=True,
    )
    cache_features_mb: int = key(
        2048,
        "largest size of these features in MiB of host memory; if they need more, the run stops at its start",
        minimum=0,
        resume_safe=True,
    )


# Kernels are split over "fsdp" along the model width and over "tensor" along heads or the feed-forward width. Layers,
# norms and biases are not split.
PROJECTIONS = (
    ProjectionSplit(r".*layers/self_attn/[qkv]_proj", (None,), ("fsdp",), ("tensor", None)),
    ProjectionSplit(r".*layers/self_attn/(o|out)_proj", (None,), ("tensor", None), ("fsdp",)),
    ProjectionSplit(r".*layers/mlp/(gate_proj|up_proj|fc1)", (None,), ("fsdp",), ("tensor",)),
    ProjectionSplit(r".*layers/mlp/(down_proj|fc2)", (None,), ("tensor",), ("fsdp",)),
    ProjectionSplit(r".*projector/linear", (), (None,), ("fsdp",)),
)
"""How the projections of the towers and the decoder are split; a method splits the arrays that it adds alike."""
SHARDING_RULES: tuple[tuple[str, Spec], ...] = (
    *quantize.SHARDING_RULES,
    *(rule for split in PROJECTIONS for method in METHODS.values() for rule in method.sharding_rules(split)),
    *((f"{split.pattern}/kernel", split.kernel) for split in PROJECTIONS),
    (r".*image_head/attention/[qkv]_proj/kernel", ("fsdp", "tensor", None)),
    (r".*image_head/attention/out_proj/kernel", ("tensor", None, "fsdp")),
    (r".*image_head/mlp/fc1/kernel", ("fsdp", "tensor")),
    (r".*image_head/mlp/fc2/kernel", ("tensor", "fsdp")),
    (r".*/(embed_tokens|token_embedding)/embedding", ("tensor", "fsdp")),
    (r".*", ()),
)


OP_CLASSES = (
    ("dequantisation", r"adapt/quantization/"),
    ("vocabulary", r"losses/(vocab_projection|chunked_\w+|token_chunks)\.py:|:Embedder\."),
    ("loss", r"paligemma_jax/losses/"),
    ("vision", r"models/vit\.py:|:ViT\.|:\w+\.encode_image"),
    ("attention", r"models/attention/|:\w*Attention\."),
    ("feed-forward", r":\w*Mlp\.|:\w*MLP\."),
    ("norms", r"models/norms\.py:"),
)
"""Classes of operations of the towers and the decoder, see `Task.op_classes`."""


def to_mesh(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Splits rows [B, ...] that every process has over the mesh; B is a multiple of `row_divisor(mesh.shape)`."""
    size = len(next(iter(arrays.values())))
    rows = sharding.local_rows(jax.process_index(), jax.process_count(), size)
    local = {name: array[rows] for name, array in arrays.items()}
    return sharding.to_global(local, mesh, sharding.batch_sharding(mesh, accumulate=False).spec)


def normalize(model: PaliGemma | DualEncoder, images: jax.Array | np.ndarray) -> jax.Array:
    """Converts images uint8 [..., I, I, 3] to float32 in the range of the model's tower."""
    return jnp.asarray(preprocessing_of(model.config).normalize(images))


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `on_progress(done, total)`: a bar on a terminal, else a printed line every 10 seconds and at the end."""
    bar, last = None, time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal bar, last
        if jax.process_index() != 0:
            return
        if sys.stderr.isatty():
            bar = bar or tqdm(total=total, desc=description, dynamic_ncols=True)
            bar.update(done - bar.n)
        elif time.monotonic() - last > 10 or done == total:
            last = time.monotonic()
            print(f"{description}: {done}/{total}", flush=True)

    try:
        yield on_progress
    finally:
        if bar is not None:
            bar.close()
