"""The suites of benchmarks run on small models, so that they cannot rot where no accelerator is at hand."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from benchmarks import gpu, results
from benchmarks.suites import SUITES


@pytest.mark.parametrize("case", gpu.CASES)
def test_a_case_of_the_gpu_suite_measures_positive_numbers(case):
    measured = gpu.CASES[case](True)
    numbers = {one.name: one.value for one in measured if "MFU" not in one.name}  # a CPU has no peak in the table
    assert numbers and all(value > 0 and math.isfinite(value) for value in numbers.values())


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


@pytest.mark.parametrize(("value", "aim", "met"), [(1.2, "at most 1.3", True), (49.0, "at least 50", False)])
def test_aims(value, aim, met):
    assert results.Measurement("x", value, "s", aim).met is met
    assert results.Measurement("x", math.nan, "s", aim).met is None
