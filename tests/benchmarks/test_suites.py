"""The suites of benchmarks run on small models, so that they cannot rot where no accelerator and no peer is at hand."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import cpu, gpu, paired, results
from benchmarks.peers.ours import works
from benchmarks.suites import SUITES


@pytest.mark.parametrize("case", gpu.CASES)
def test_a_case_of_the_gpu_suite_measures_positive_numbers(case):
    measured = gpu.CASES[case](True)
    numbers = {one.name: one.value for one in measured if "MFU" not in one.name}  # a CPU has no peak in the table
    assert numbers and all(value > 0 and math.isfinite(value) for value in numbers.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the CPU suite's programs read."""
    path = tmp_path_factory.mktemp("model")
    cpu.write_folder(path, tiny=True)
    return path


def test_steps_that_are_compared_start_from_the_same_loss(folder):
    lora, full = works(unroll=True)["LoRA step"](folder), works(unroll=False)["full step"](folder)
    assert lora.run() == pytest.approx(full.run(), rel=1e-5)  # adapters start at zero
    assert min(full.times()) > 0


def test_generations_that_are_compared_start_with_the_same_token(folder):
    first, later = (works(unroll=False)[work](folder) for work in ("first token", "decoded token"))
    assert np.array_equal(np.array(later.run())[:, :1], first.run())


def test_the_compared_evaluation_gives_the_loss_of_the_references(folder):
    assert 0 < works(unroll=False)["evaluation"](folder).run() < 2 * math.log(cpu.TINY.decoder.vocab_size)


def test_programs_run_in_turns(tmp_path):
    log = tmp_path / "log"
    code = "from benchmarks.peers.turns import Work, serve; serve({{'work': lambda log: Work(lambda: {0})}})"
    writes = "log.open('a').write('{0}')"
    commands = [[sys.executable, "-c", code.format(writes.format(name)), str(log), "work"] for name in "ab"]
    times = paired.in_turns(commands, rounds=3)
    assert log.read_text()[-6:] == "abbaab"
    assert [one.result for one in times] == [1, 1] and all(len(one.seconds) == 3 for one in times)


def test_a_program_that_ends_is_named():
    with pytest.raises(RuntimeError, match="import nothing.*exit status 1"):
        paired.in_turns([[sys.executable, "-c", "import nothing"]], rounds=1)


def test_a_peer_that_is_not_installed_says_what_it_needs(monkeypatch, tmp_path):
    alone = paired.Times(np.ones(3), np.ones(3), 2**30, 0.5)
    monkeypatch.setattr(paired, "in_turns", lambda commands, rounds: [alone] * len(commands))
    absent = paired.Peer(paired.Program("x", ("no_such_package",)))
    peers = {"X": absent, "again": paired.Peer(cpu.OURS, "at least 2", "at least 1")}
    found = paired.beside(cpu.OURS, peers, tmp_path, "work", 3)
    entry = {"commit": "abc", "machine": "m", "versions": {}, "measurements": list(map(dataclasses.asdict, found))}
    text = results.table({"w": entry}, ["w"], ["w"])
    assert "| w, X (a) | not run: needs no_such_package |" in text
    assert "| w, again (a) | 1 (1 to 1) | 1 | 1 (1 to 1), at least 2: missed |" in text
    assert not results.complete(entry)


def test_a_suite_runs_what_is_missing_and_prints_one_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--suite=gpu", "--tiny", "--only=sigmoid loss"]
    command += [f"--folder={tmp_path}"]
    first = subprocess.run(command, capture_output=True, text=True, check=True, cwd=results.ROOT)
    stored = json.loads((tmp_path / "gpu-tiny.json").read_text())
    again = subprocess.run([*command, "--minutes=0"], capture_output=True, text=True, check=True, cwd=results.ROOT)
    assert "sigmoid loss (a): loss and gradient" in first.stdout
    assert first.stdout == again.stdout and stored == json.loads((tmp_path / "gpu-tiny.json").read_text())


def test_a_case_that_was_not_run_says_so():
    assert "| full step | not run |" in results.table({}, list(SUITES["gpu"].cases))


def test_cases_that_are_compared_have_a_row_each():
    small, large = results.Measurement("memory", 3.0, "GiB"), results.Measurement("memory", 462.0, "GiB")
    entry = {"commit": "abc", "machine": "m", "versions": {"jax": "1"}}
    measured = {"on 4": [small, results.Measurement("time", 150.0, "ms")], "on 1": [large]}
    stored = {case: entry | {"measurements": list(map(dataclasses.asdict, found))} for case, found in measured.items()}
    text = results.table(stored, ["on 1", "on 4", "on 16"], compared=["on 1", "on 4", "on 16"])
    assert text.splitlines()[0] == "| case | memory, GiB | time, ms |"
    assert text.splitlines()[2:5] == ["| on 1 (a) | 462 |  |", "| on 4 (a) | 3 | 150 |", "| on 16 | not run | |"]


def test_a_row_has_the_spread_and_the_aim():
    one = results.Measurement("ratio", 1.25, "", "at least 1.1", (1.2, 1.3))
    entry = {"commit": "abc", "machine": "m", "versions": {}, "measurements": [dataclasses.asdict(one)]}
    assert "| x (a) | 1.25 (1.2 to 1.3), at least 1.1: met |" in results.table({"x": entry}, ["x"], ["x"])
    assert "| x (a): ratio | 1.25 (1.2 to 1.3) |  | at least 1.1 | met |" in results.table({"x": entry}, ["x"])


@pytest.mark.parametrize(("value", "aim", "met"), [(1.2, "at most 1.3", True), (49.0, "at least 50", False)])
def test_aims(value, aim, met):
    assert results.Measurement("x", value, "s", aim).met is met
    assert results.Measurement("x", math.nan, "s", aim).met is None
