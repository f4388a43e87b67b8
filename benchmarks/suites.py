"""The cases of each suite by name, the most valuable first: functions of `tiny` that return measurements."""

from collections.abc import Callable, Sequence

from benchmarks import gpu
from benchmarks.results import Measurement

Case = Callable[[bool], Sequence[Measurement]]

SUITES: dict[str, dict[str, Case]] = {"gpu": gpu.CASES}
