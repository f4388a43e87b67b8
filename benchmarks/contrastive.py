"""Temporary memory and time of the contrastive losses and gradients on one device, compared with the full matrix.

    python benchmarks/contrastive.py [--batch=8192] [--width=768] [--chunks=256] [--dtype=float32] [--rounds=5]
        [--losses=sigmoid,softmax]

"temporary" is the memory that the compiler plans beside arguments and results. The losses take turns, so that other
load on the machine affects all alike; prints the fastest round of each. Ratios are full matrix / chunks.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from paligemma_jax.losses import reference as contrastive_reference
from paligemma_jax.losses import sigmoid_loss, softmax_loss
from train_jax.system.memory import format_bytes, step_memory


def full_softmax(zimg, ztxt, log_scale, bias) -> jax.Array:
    """Calls `contrastive_reference.softmax_loss`, with the signature of the other losses."""
    return contrastive_reference.softmax_loss(zimg, ztxt, log_scale)


def chunked_softmax(zimg, ztxt, log_scale, bias, chunk_size: int) -> jax.Array:
    """Calls `softmax_loss`, with the signature of the other losses."""
    return softmax_loss(zimg, ztxt, log_scale, chunk_size=chunk_size)


LOSSES = {"sigmoid": (contrastive_reference.sigmoid_loss, sigmoid_loss), "softmax": (full_softmax, chunked_softmax)}


def make_arguments(batch: int, width: int, dtype: str) -> tuple[jax.Array, ...]:
    """Returns unit embeddings [batch, width] of images and texts, and SigLIP's initial log scale and bias."""
    zimg, ztxt = jax.random.normal(jax.random.key(0), (2, batch, width))
    unit = [(rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype) for rows in (zimg, ztxt)]
    return *unit, jnp.log(10.0), jnp.float32(-10.0)


def fastest(steps: list[Callable], arguments: tuple[jax.Array, ...], rounds: int) -> list[float]:
    """Returns the seconds of the fastest round of each step, after one round of warm-up."""
    best = [float("inf")] * len(steps)
    for number in range(rounds + 1):
        for index, step in enumerate(steps):
            began = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            if number:
                best[index] = min(best[index], time.perf_counter() - began)
    return best


def main() -> None:
    """Prints a row for each loss and chunk size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunks", default="256", help="texts of a chunk, several separated by commas")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", default=",".join(LOSSES), help="separated by commas")
    options = parser.parse_args()
    arguments = make_arguments(options.batch, options.width, options.dtype)
    print(f"{jax.devices()[0].device_kind}, embeddings [{options.batch}, {options.width}] in {options.dtype}")
    print(f"{'':<22} {'temporary':>10} {'ratio':>7} {'ms':>9} {'ratio':>7}")
    for name in options.losses.split(","):
        full, chunked = LOSSES[name]
        losses = {f"{name}, full matrix": full}
        for chunk in map(int, options.chunks.split(",")):
            losses[f"{name}, chunks of {chunk}"] = functools.partial(chunked, chunk_size=chunk)
        steps = [
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments).compile()
            for loss in losses.values()
        ]
        memory = [step_memory(step) for step in steps]
        seconds = fastest(steps, arguments, options.rounds)
        for row, planned, time_taken in zip(losses, memory, seconds, strict=True):
            print(
                f"{row:<22} {format_bytes(planned.temp):>10} {memory[0].temp / planned.temp:>7.1f} "
                f"{1e3 * time_taken:>9.1f} {seconds[0] / time_taken:>7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
