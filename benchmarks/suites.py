"""The cases of each suite by name, the most valuable first: functions of `tiny` that return measurements."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from benchmarks import cpu, gpu, tpu_compile
from benchmarks.results import Measurement

Case = Callable[[bool], Sequence[Measurement]]


class Suite(NamedTuple):
    """A suite of benchmarks.

    Attributes:
      cases: by name, the most valuable first.
      compared: names of cases with the same measurements, which are printed in one row each.
    """

    cases: Mapping[str, Case]
    compared: Collection[str] = ()


SUITES = {
    "cpu": Suite(cpu.CASES, cpu.COMPARED),
    "gpu": Suite(gpu.CASES),
    "tpu-compile": Suite(tpu_compile.TARGETS | tpu_compile.SIZES, tpu_compile.SIZES),
}
