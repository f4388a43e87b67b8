"""Microseconds to compute the order of one batch: grain's shuffle, place by place, and `train_jax.data.shuffle`.

    python benchmarks/shuffle.py

The fastest of `--repeats` batches. On a core of a shared AMD EPYC, Python 3.11, numpy 2.4.6, grain 0.2.18:

| examples | batch | grain | ours |
|---|---|---|---|
| 10,000 | 64 | 415 | 5 |
| 10,000 | 256 | 1,732 | 8 |
| 700,000 | 64 | 362 | 67 |
| 700,000 | 256 | 1,429 | 94 |
| 700,000 | 1,024 | 5,956 | 149 |
| 10,000,000 | 1,024 | 6,168 | 193 |

A training step of the flow tutorial's network takes 1,300 at batch 256 (docs/flow.md).
"""

import argparse
import time
from collections.abc import Callable

import grain
import numpy as np

from train_jax.data.shuffle import Order

SIZES = (10_000, 700_000, 10_000_000)  # 10,000 is below SMALL: a whole epoch is computed at once and kept
BATCHES = (64, 256, 1024)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Time to compute the order of a batch: grain's and ours.")
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    print(f"{'examples':>12}{'batch':>8}{'grain':>10}{'ours':>8}   microseconds per batch")
    for size in SIZES:
        reference, order = grain.MapDataset.range(size).seed(0).shuffle().repeat(), Order(size, 0)
        for batch in BATCHES:
            by_grain = fastest(
                lambda places, data=reference: [data[place] for place in places.tolist()], batch, repeats
            )
            ours = fastest(order.at, batch, repeats)
            print(f"{size:>12,}{batch:>8,}{by_grain:>10,.0f}{ours:>8,.0f}")


def fastest(compute: Callable[[np.ndarray], object], batch: int, repeats: int) -> float:
    """Returns the microseconds of the fastest of `repeats` calls, each on the next batch of places."""
    times = []
    for step in range(repeats):
        places = np.arange(step * batch, (step + 1) * batch)
        start = time.perf_counter()
        compute(places)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


if __name__ == "__main__":
    main()
