"""Times exact minibatch couplings: ours, scipy's solver, and POT's if it is installed.

    OMP_NUM_THREADS=1 python benchmarks/coupling.py [--sizes=256,1024,2048] [--repeats=3]

All solve the same assignment in float64: normal noise to eight clusters in 2D, or to data of low rank in 3,072
dimensions. Prints the minimum seconds over repeats and checks that the costs agree.
"""

import argparse
import importlib
import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from flow_jax.couplings.assignment import assign
from flow_jax.couplings.pairings import host_cost


def make_cost(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Returns the cost between noise and data, [n, n]."""
    rng = np.random.default_rng(seed)
    x_0 = rng.normal(size=(n, dim))
    if dim == 2:
        angle = rng.integers(0, 8, n) * np.pi / 4
        x_1 = 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * rng.normal(size=(n, 2))
    else:
        x_1 = rng.normal(size=(n, 64)) @ rng.normal(size=(64, dim)) / 8
    return host_cost(x_0, x_1)


def solvers() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Returns solvers by name; each returns for a cost the column assigned to each row."""
    solvers = {"ours": assign, "scipy": lambda cost: linear_sum_assignment(cost)[1]}
    try:
        pot = importlib.import_module("ot")
    except ImportError:
        return solvers
    # The default limit on iterations stops before the optimum at 4,096 rows.
    return solvers | {"pot": lambda cost: pot.emd([], [], cost, numItermax=10**9).argmax(axis=1)}


def main() -> None:
    """Prints a row for each dimension and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,1024,2048")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for dim in (2, 3072):
        for n in map(int, args.sizes.split(",")):
            cost, totals, line = make_cost(n, dim), [], f"d={dim:<5} n={n:<5}"
            for name, solve in solvers().items():
                seconds = []
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    columns = solve(cost)
                    seconds.append(time.perf_counter() - start)
                totals.append(cost[np.arange(n), columns].sum())
                line += f" {name} {min(seconds):.4f}"
            np.testing.assert_allclose(totals, totals[0], rtol=1e-9)
            print(line)


if __name__ == "__main__":
    main()
