import pytest

from train_jax.core import patterns
from train_jax.core.errors import UserError

PATHS = [
    "decoder/layers/self_attn/q_proj/kernel",
    "decoder/layers/self_attn/o_proj/kernel",
    "vision/layers/self_attn/q_proj/kernel",
    "vision/norm/scale",
]


def test_first_matching_rule_wins():
    rules = [("vision/norm/.*", 1), ("vision/.*", 2), (".*", 3)]
    assert list(patterns.cover(rules, PATHS).values()) == [3, 3, 2, 1]


def test_patterns_match_whole_paths():
    with pytest.raises(UserError, match="no rule matches vision/norm/scale:"):
        patterns.cover([("vision/norm", 1), ("norm/scale", 2)], ["vision/norm/scale"])


def test_cover_returns_the_rule_of_each_path():
    rules = [("vision/.*", "a"), ("decoder/.*", "b")]
    assert patterns.cover(rules, PATHS) == dict(zip(PATHS, "bbaa", strict=True))


def test_cover_lists_uncovered_paths():
    with pytest.raises(UserError, match="no rule matches vision/layers/self_attn/q_proj/kernel, vision/norm/scale:"):
        patterns.cover([("decoder/.*", 1)], PATHS)


def test_cover_refuses_unused_rules_unless_allowed():
    rules = [(".*", 0), ("vison/norm/scale", 1)]
    with pytest.raises(UserError, match="'vison/norm/scale' matches none of 4 paths .nearest are vision/norm/scale"):
        patterns.cover(rules, PATHS)
    assert patterns.cover(rules, PATHS, allow_unused=True) == dict.fromkeys(PATHS, 0)


def test_cover_accepts_rules_shadowed_by_earlier_ones():
    assert patterns.cover([(".*", 0), ("vision/.*", 1)], PATHS) == dict.fromkeys(PATHS, 0)


def test_select_keeps_order_and_scope():
    assert patterns.select(r"decoder/.*/(q_proj|o_proj)/kernel", PATHS) == PATHS[:2]
    assert patterns.select(r".*/q_proj/.*", PATHS) == [PATHS[0], PATHS[2]]


def test_select_suggests_the_nearest_paths():
    with pytest.raises(UserError, match="lora targets: 'vision/norms/scale' matches none .*vision/norm/scale"):
        patterns.select("vision/norms/scale", PATHS, what="lora targets")


def test_malformed_pattern_is_a_user_error():
    with pytest.raises(UserError, match=r"'decoder/\(' is not a regular expression"):
        patterns.select("decoder/(", PATHS)
