"""The list of cases that are left out by default."""

import ast
import re
from pathlib import Path

import pytest

from tests.exhaustive import LIST, patterns

ROOT = Path(__file__).parent.parent


def test_patterns_match_what_they_say():
    (only,) = [pattern for pattern in patterns() if "have_attention" in pattern.pattern]
    name = "tests/flow_jax/models/test_velocity_models.py::test_unets_of_the_papers_table_have_attention_where_it_says"
    assert only.fullmatch(f"{name}[changes1-14]") and only.fullmatch(f"{name}[changes2-21]")
    assert not only.fullmatch(f"{name}[changes0-5]")


@pytest.mark.parametrize("line", [line for line in LIST.read_text().splitlines() if line.startswith("tests/")])
def test_every_line_names_a_test_that_exists(line):
    """A renamed test does not stay on the list unseen."""
    file, _, name = line.partition("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    prefix = re.match(r"\w*", name)[0]
    assert not prefix or prefix in functions
