"""Optimizer state, planned memory and time of a step of each optimizer, for a given number of parameters.

    python benchmarks/optimizers.py [--millions=16] [--width=1024] [--steps=10] [--names=adamw,adamw_8bit]

Parameters are a float32 stack of layers [layers, width, 4 * width]. The step computes gradients, and state and
parameters are donated, as in training. "temporary" is the memory that the compiler plans beside arguments.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

from train_jax.config.base import runtime_defaults
from train_jax.optim.optimizers import make_optimizer, make_schedule
from train_jax.system.memory import format_bytes, step_memory

# Settings of each row; with momentum they compare with Adam, which has a first moment.
OPTIMIZERS = {
    "adamw": dict(name="adamw"),
    "adamw_8bit": dict(name="adamw_8bit"),
    "adafactor": dict(name="adafactor"),
    "adafactor with momentum": dict(name="adafactor", momentum=0.9),
    "lion": dict(name="lion", b2=0.99),
    "sgd": dict(name="sgd"),
    "sgd with momentum": dict(name="sgd", momentum=0.9),
}


def make_params(count: int, width: int) -> dict[str, jax.Array]:
    """Returns `count` random numbers as a stack of layers [layers, width, 4 * width] and a vector of the rest."""
    layers, rest = divmod(count, 4 * width * width)
    shapes = {"layers/kernel": (layers, width, 4 * width), "rest/kernel": (rest,)}
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        path: jax.random.normal(key, shapes[path]) for path, key in zip(shapes, keys, strict=True) if shapes[path][0]
    }


def measure(settings: dict, count: int, width: int, steps: int) -> tuple[int, str, float]:
    """Returns the bytes of the state, the planned temporary memory (or "unknown"), and the seconds of a step."""
    config = runtime_defaults().optimizer
    config.update(settings, weight_decay=0.01)
    params = make_params(count, width)
    optimizer = make_optimizer(config, make_schedule(config, steps, 0), params)
    state = jax.jit(optimizer.init)(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def step(params, state):
        gradients = jax.tree.map(lambda leaf: 1e-3 * jnp.cos(7 * leaf), params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    memory = step_memory(compiled)
    params, state = jax.block_until_ready(compiled(params, state))
    began = time.perf_counter()
    for _ in range(steps):
        params, state = compiled(params, state)
    jax.block_until_ready(params)
    return size, "unknown" if memory is None else format_bytes(memory.temp), (time.perf_counter() - began) / steps


def main() -> None:
    """Prints a row for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=16.0, help="parameters, in millions")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--names", default=",".join(OPTIMIZERS), help="rows of the table, separated by commas")
    options = parser.parse_args()
    names, count = options.names.split(","), int(options.millions * 1e6)
    if unknown := set(names) - set(OPTIMIZERS):
        parser.error(f"--names has {', '.join(sorted(unknown))}, expected some of {', '.join(OPTIMIZERS)}")
    print(f"{jax.devices()[0].device_kind}, {count:,} parameters in float32")
    print(f"{'':<24} {'state':>10} {'bytes/parameter':>16} {'temporary':>10} {'ms/step':>10}")
    for name in names:
        size, temporary, seconds = measure(OPTIMIZERS[name], count, options.width, options.steps)
        print(
            f"{name:<24} {format_bytes(size):>10} {size / count:>16.3f} {temporary:>10} {1e3 * seconds:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
