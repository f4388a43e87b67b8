"""Leaves out the cases that exhaustive.txt lists, so that the suite is quick enough to be run before every commit.

A plugin (see conftest.py). In a pattern `*` stands for anything and `[01]` for one of these digits.
"""

import re
from pathlib import Path

import pytest

LIST = Path(__file__).with_suffix(".txt")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run the cases of tests/exhaustive.txt")


def patterns() -> list[re.Pattern]:
    """Of node ids."""
    lines = [line.strip() for line in LIST.read_text(encoding="utf-8").splitlines()]
    return [_compiled(line) for line in lines if line and not line.startswith("#")]


def _compiled(pattern: str) -> re.Pattern:
    parts = re.split(r"(\*|\[\d+\])", pattern)
    return re.compile(
        "".join({"*": ".*"}.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--exhaustive"):
        return
    listed = patterns()
    out = [item for item in items if any(pattern.fullmatch(item.nodeid) for pattern in listed)]
    if len(out) < len(items):  # a case that is asked for by its name alone runs
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
