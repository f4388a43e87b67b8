"""Regular expressions over "/"-joined parameter paths: the one way this project names groups of leaves.

A pattern matches a whole path (`re.fullmatch`), so `decoder/.*/q_proj` does not reach `decoder/0/q_proj_norm` by
accident. Of several rules the first that matches wins. A pattern that matches nothing is a mistake, and is reported
with the paths that look most like it.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from train_jax.core.errors import UserError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Returns up to `n` of `names` that look like `name`, best first; empty when nothing does."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the nearest of `names`, or "" when none is near, to end a `UserError` with."""
    close = nearest(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression ({error}): correct the pattern") from error


def check_regex(pattern: str) -> None:
    """Raises UserError if a pattern is not a regular expression; whether it matches anything, `select` tells."""
    _compile(pattern)


def cover(rules: Sequence[tuple[str, T]], paths: Iterable[str], allow_unused: bool = False) -> dict[str, T]:
    """Returns the value of the first matching rule for every path.

    Args:
      rules: (pattern, value) pairs, the first match wins.
      paths: "/"-joined paths; each must match at least one rule.
      allow_unused: accept a rule that matches no path at all (a rule shadowed by earlier ones counts as used).

    Raises:
      UserError: paths without a rule, or a rule without a path.
    """
    paths = list(paths)
    compiled = [(_compile(pattern), value) for pattern, value in rules]
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
      what: what the pattern chooses, for the error ("lora targets").

    Raises:
      UserError: nothing matches; the message names the nearest paths.
    """
    paths = list(paths)
    compiled = _compile(pattern)
    matched = [path for path in paths if compiled.fullmatch(path)]
    if not matched:
        examples = nearest(pattern, paths) or paths[:3]
        near = f"nearest are {', '.join(examples)}" if examples else "there are no paths at all"
        raise UserError(f"{what}: {pattern!r} matches none of {len(paths)} paths ({near}): correct the pattern")
    return matched
