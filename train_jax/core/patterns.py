"""Regular expressions over "/"-joined parameter paths, which select groups of parameters everywhere in this project.

A pattern matches a whole path (`re.fullmatch`), so `decoder/.*/q_proj` does not match `decoder/0/q_proj_norm`. The
first of several rules that matches wins. A pattern that matches nothing is an error that lists the most similar paths.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from train_jax.core.errors import UserError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Returns up to `n` of `names` that are similar to `name`, most similar first."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the most similar of `names`, or "", for the end of a message."""
    close = nearest(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def compile_regex(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern; raises UserError if it is not a regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression ({error}): correct the pattern") from error


def cover(rules: Sequence[tuple[str, T]], paths: Iterable[str], allow_unused: bool = False) -> dict[str, T]:
    """Returns the value of the first matching rule for every path.

    Args:
      rules: (pattern, value) pairs, the first match wins.
      paths: "/"-joined paths; each must match at least one rule.
      allow_unused: accept a rule that matches no path (one that only loses to earlier rules counts as used).

    Raises:
      UserError: a path matches no rule, or a rule matches no path.
    """
    paths = list(paths)
    compiled = [(compile_regex(pattern), value) for pattern, value in rules]
    covered: dict[str, T] = {}
    for path in paths:
        for pattern, value in compiled:
            if pattern.fullmatch(path):
                covered[path] = value
                break
    uncovered = [path for path in paths if path not in covered]
    if uncovered:
        shown = ", ".join(uncovered[:5]) + (f" and {len(uncovered) - 5} more" if len(uncovered) > 5 else "")
        raise UserError(f"no rule matches {shown}: add a rule, or end the rules with ('.*', ...)")
    if not allow_unused:
        for pattern, _ in compiled:
            select(pattern.pattern, paths, what="rule")
    return covered


def select(pattern: str, paths: Iterable[str], what: str = "pattern") -> list[str]:
    """Returns the paths that `pattern` matches in full, in their order.

    Args:
      pattern: a regular expression.
      paths: "/"-joined paths.
      what: what the pattern selects, for the message ("lora targets").

    Raises:
      UserError: no path matches; the message lists the most similar paths.
    """
    paths = list(paths)
    compiled = compile_regex(pattern)
    matched = [path for path in paths if compiled.fullmatch(path)]
    if not matched:
        examples = nearest(pattern, paths) or paths[:3]
        near = f"nearest are {', '.join(examples)}" if examples else "there are no paths at all"
        raise UserError(f"{what}: {pattern!r} matches none of {len(paths)} paths ({near}): correct the pattern")
    return matched
