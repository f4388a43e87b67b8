"""Compares 2D flow matching with torchcfm and torchdiffeq: training steps, exact couplings, sampling.

    pip install -e ".[bench]"
    taskset -c 0,1 python -m benchmarks.flow [--steps=200] [--rounds=5] [--cases=step,coupled,sample] [--check]

Both implementations do the same work in one process on all of its cores, in turns. Prints the median wall time over
rounds. `step` and `coupled` train from 8 Gaussians to moons, as in torchcfm's tutorial: an MLP of 3 x 256 (SELU, input
x and t), Adam, sigma 0.1, a training set of 200,000 points and new noise in every step. Ours is the compiled step of
train.py with its guard, metrics and prefetching threads, which start in the timed part; theirs is the loop of the
tutorial. `coupled` pairs every batch by an exact coupling. `sample` integrates one trained field with Dopri5 at 1e-5,
with our weights copied to their model.

--check exits with status 1 if a ratio is below its minimum.
"""

import argparse
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher
from torchcfm.models import MLP
from torchdiffeq import odeint

import flow_jax as fj
from benchmarks.paired import measured
from benchmarks.results import Measurement
from benchmarks.training import TrainingRun
from flow_jax.data import toys
from train_jax.config.base import base_config
from train_jax.core import param_tree

NOISE, DATA, POINTS = "8gaussians", "moons", 200_000
WIDTH, RATE, SIGMA = 256, 1e-3, 0.1
TOLERANCE = 1e-5
CASES = ("step", "coupled", "sample")
PACKAGES = ("jax", "flax", "diffrax", "torch", "torchcfm", "torchdiffeq", "POT", "numpy", "scipy")


class Case(NamedTuple):
    """A comparison: one round of each implementation, and the minimum speedup of ours."""

    title: str
    ours: Callable[[], None]
    theirs: Callable[[], None]
    work: int  # steps or samplings in a round
    min_ratio: float


def make_config(batch_size: int, coupling: str, threads: int) -> ConfigDict:
    """Returns the config of the comparison."""
    config = base_config("flow_jax.tasks.plane:PlaneFlow")
    config.batch_size, config.data.threads = batch_size, threads
    config.data.noise, config.data.name, config.data.num_examples = NOISE, DATA, POINTS
    config.model.update({"width": WIDTH, "depth": 3, "activation": "selu", "time_width": 0})
    config.path.name, config.path.sigma = "cfm", SIGMA
    config.coupling.name = coupling
    config.optimizer.learning_rate = RATE  # of adamw without weight decay
    config.total_steps = 1_000_000  # the caller says how many
    config.log_steps = config.eval_steps = config.checkpoint_steps = 1_000_000
    return config


class Theirs:
    """The loop of torchcfm's tutorial."""

    def __init__(self, batch_size: int, matcher: ConditionalFlowMatcher):
        torch.manual_seed(0)
        self.net = MLP(dim=2, w=WIDTH, time_varying=True)
        self.optimizer = torch.optim.Adam(self.net.parameters(), RATE)
        self.matcher, self.batch_size = matcher, batch_size
        self.points = torch.from_numpy(toys.draw(DATA, POINTS, 0))
        angle = torch.arange(8) * (torch.pi / 4)
        self.centres = 5 * torch.stack([angle.cos(), angle.sin()], 1)

    def train(self, steps: int) -> None:
        """Runs more steps."""
        n = self.batch_size
        for _ in range(steps):
            self.optimizer.zero_grad()
            x_0 = self.centres[torch.randint(8, (n,))] + 0.1**0.5 * torch.randn(n, 2)
            x_1 = self.points[torch.randint(POINTS, (n,))]
            t, x_t, u_t = self.matcher.sample_location_and_conditional_flow(x_0, x_1)
            loss = ((self.net(torch.cat([x_t, t[:, None]], 1)) - u_t) ** 2).mean()
            loss.backward()
            self.optimizer.step()


def step_case(ours: TrainingRun, steps: int) -> Case:
    """Returns the comparison of training steps."""
    theirs = Theirs(ours.config.batch_size, ConditionalFlowMatcher(SIGMA))
    sizes = [sum(leaf.size for leaf in param_tree.flatten(ours.model()).values())]
    sizes.append(sum(leaf.numel() for leaf in theirs.net.parameters()))
    assert sizes[0] == sizes[1], f"the models have {sizes} parameters"
    print(f"both models are MLPs with {sizes[0]:,} parameters")
    return Case("step", lambda: ours.train(steps), lambda: theirs.train(steps), steps, 1.15)


def coupled_case(steps: int, threads: int) -> Case:
    """Returns the comparison of training steps with exact couplings."""
    ours = TrainingRun(make_config(1024, "exact", threads))
    theirs = Theirs(1024, ExactOptimalTransportConditionalFlowMatcher(SIGMA))
    return Case("coupled", lambda: ours.train(steps), lambda: theirs.train(steps), steps, 1.2)


def sample_case(ours: TrainingRun, solves: int) -> Case:
    """Returns the comparison of sampling: both integrate the field that `ours` has learned, from 10,000 points."""
    ours.train(max(0, 1500 - ours.done))
    model, net = ours.model(), MLP(dim=2, w=WIDTH, time_varying=True)
    layers = [layer for layer in net.net if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for layer, source in zip(layers, (model.inputs, *model.hidden, model.outputs), strict=True):
            layer.weight.copy_(torch.from_numpy(np.array(source.kernel[...]).T))
            layer.bias.copy_(torch.from_numpy(np.array(source.bias[...])))
    x_0 = toys.draw(NOISE, 10_000, 1)
    calls, ends = [0], torch.tensor([0.0, 1.0])

    def field(t, x):
        calls[0] += 1
        return net(torch.cat([x, t.expand(len(x), 1)], 1))

    def their_sample():
        with torch.no_grad():
            return odeint(field, torch.from_numpy(x_0), ends, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1]

    def our_sample():
        return fj.sample(model, x_0, solver="dopri5", rtol=TOLERANCE, atol=TOLERANCE)

    with torch.no_grad():
        velocity = field(torch.tensor(0.5), torch.from_numpy(x_0)).numpy()
    np.testing.assert_allclose(np.asarray(model(0.5, x_0)), velocity, rtol=1e-4, atol=1e-4)
    calls[0] = 0
    result, expected = our_sample(), their_sample().numpy()
    nfe = int(result.nfe), calls[0]
    gap = np.abs(np.asarray(result.x) - expected)
    print(f"Dopri5 at {TOLERANCE:g}: {nfe[0]} evaluations, torchdiffeq {nfe[1]}; outputs differ by {gap.mean():.1e} on "
          f"average, {gap.max():.1e} at most")  # fmt: skip
    assert gap.mean() < 100 * TOLERANCE, "the implementations sample different points"  # local errors accumulate

    def repeat(function):
        for _ in range(solves):
            jax.block_until_ready(function())

    return Case("sample", lambda: repeat(lambda: our_sample().x), lambda: repeat(their_sample), solves, 2.0)


def make_case(name: str, options: argparse.Namespace) -> Case:
    """Returns a case by name."""
    if name == "coupled":
        return coupled_case(options.steps, options.threads)
    ours = TrainingRun(make_config(256, "independent", options.threads))
    return step_case(ours, options.steps) if name == "step" else sample_case(ours, options.solves)


def compare(case: Case, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns our and their seconds for a step or a sampling in each round, after one of warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            time.sleep(0.2)  # lets the threads of the other implementation go idle
            began = time.perf_counter()
            (case.ours, case.theirs)[index]()
            if number >= 0:
                seconds[index].append((time.perf_counter() - began) / case.work)
    return np.array(seconds[0]), np.array(seconds[1])


def measure(name: str) -> list[Measurement]:
    """Compares a case for the CPU suite."""
    case = make_case(name, arguments().parse_args([]))
    ours, theirs = compare(case, rounds=11)
    return [
        dataclasses.replace(measured("time", ours, "s"), of="ours"),
        dataclasses.replace(measured("time", theirs, "s"), of="theirs"),
        dataclasses.replace(measured("time over ours", theirs / ours, "", f"at least {case.min_ratio}"), of="theirs"),
    ]


def check(case: Case, rounds: int) -> bool:
    """Compares a case and prints a row; returns whether the ratio reaches its minimum."""
    seconds = compare(case, rounds)
    ours, theirs = 1e3 * np.median(seconds, axis=1)
    ratios = seconds[1] / seconds[0]
    reached = theirs / ours >= case.min_ratio
    print(
        f"{case.title:<9} {ours:>9.2f} {theirs:>9.2f} {theirs / ours:>7.2f} {min(ratios):>7.2f} {max(ratios):>7.2f} "
        f"{case.min_ratio:>8.2f} {'' if reached else 'too low'}",
        flush=True,
    )
    return bool(reached)


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--solves", type=int, default=5, help="samplings in a round")
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--threads", type=int, default=2, help="our data.threads, which read and couple batches")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a ratio is below its minimum")
    return parser


def main() -> int:
    """Prints a row for each case and returns the exit status."""
    parser = arguments()
    options = parser.parse_args()
    names = options.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--cases has {', '.join(sorted(unknown))}, expected some of {', '.join(CASES)}")
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(cores)
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print(f"{cores} cores, torch {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; float32 on the CPU")
    cases = [make_case(name, options) for name in names]
    print(f"{'':<9} {'ours, ms':>9} {'theirs':>9} {'ratio':>7} {'min':>7} {'max':>7} {'required':>8}")
    reached = [check(case, options.rounds) for case in cases]
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    return int(options.check and not all(reached))


if __name__ == "__main__":
    sys.exit(main())
