"""Deselects the cases listed in exhaustive.txt, so that the suite is fast enough to run before every commit.

A plugin (see conftest.py). In a pattern, `*` matches anything and `[01]` one of these digits.
"""

import re
from pathlib import Path

import pytest

LIST = Path(__file__).with_suffix(".txt")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run the cases of tests/exhaustive.txt")


def patterns() -> list[re.Pattern]:
    """Returns the patterns of node ids in exhaustive.txt."""
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
    deselected = [item for item in items if any(pattern.fullmatch(item.nodeid) for pattern in listed)]
    if len(deselected) < len(items):  # otherwise all were requested by name, and run
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]
