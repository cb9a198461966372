"""The one skip rule, as a table, and against an independent matcher that walks segments."""

import itertools
import random
from fnmatch import fnmatchcase

import pytest

from qexp.config.module_patterns import anywhere, covering, covers, unmatched_patterns
from tests.cpu_time import quiet_seconds

TABLE = [
    # a dotted path covers the module and all below it, anchored at both ends of each segment
    ("proj_out", "proj_out", True),
    ("proj_out", "proj_out.linear", True),
    ("proj_out", "proj_out2", False),
    ("proj_out", "blocks.0.proj_out", False),
    ("blocks.0", "blocks.0", True),
    ("blocks.0", "blocks.0.attn.q", True),
    ("blocks.0", "blocks.00", False),
    ("blocks.0", "blocks.01.attn", False),
    ("blocks.0", "blocks.10", False),
    ("blocks.0", "extra_blocks.0", False),
    ("blocks.0", "extra.blocks.0", False),
    ("blocks.0.attn", "blocks.0", False),
    ("blocks.0.attn", "blocks.0.attn.to_q", True),
    ("blocks.0.attn", "extra_blocks.0.attn", False),
    ("blocks.0.to_q", "extra_blocks.0.to_q", False),
    # * is one segment
    ("blocks.*", "blocks.0", True),
    ("blocks.*", "blocks.0.attn", True),
    ("blocks.*", "blocks", False),
    ("blocks.*.attn", "blocks.11.attn.q", True),
    ("blocks.*.attn", "blocks.attn", False),
    ("blocks.*.attn", "blocks.0.1.attn", False),
    ("*.attn", "block.attn", True),
    ("*.attn", "attn", False),
    ("*.attn", "a.b.attn", False),
    ("*", "anything.below", True),
    ("*", "", False),
    ("*.*", "one", False),
    ("*.*", "one.two", True),
    # ** is any number of segments, none included
    ("**.norm", "norm", True),
    ("**.norm", "a.norm", True),
    ("**.norm", "a.b.norm.weight_norm", True),
    ("**.norm", "a.norm2", False),
    ("**.norm", "a.my_norm", False),
    ("blocks.**.fc", "blocks.fc", True),
    ("blocks.**.fc", "blocks.0.fc", True),
    ("blocks.**.fc", "blocks.0.ff.fc", True),
    ("blocks.**.fc", "extra.blocks.0.fc", False),
    ("blocks.**.fc", "blocks.0.fc2", False),
    ("blocks.**", "blocks", True),
    ("blocks.**", "blocks.0.fc", True),
    ("blocks.**", "blocks2.0", False),
    ("**", "", True),
    ("**", "a.b.c", True),
    ("**.**", "a", True),
    ("**.a.**.b", "a.b", True),
    ("**.a.**.b", "x.a.y.z.b.below", True),
    ("**.a.**.b", "b.a", False),
    ("**.attn.to_*", "blocks.0.attn.to_q", True),
    ("**.*", "a", True),
    ("**.*.b", "b", False),
    # * inside a segment is any characters but a dot
    ("to_*", "to_q", True),
    ("to_*", "to_out.0", True),
    ("to_*", "into_q", False),
    ("*_q", "to_q", True),
    ("*_q", "to_q2", False),
    ("*_q", "a.to_q", False),
    ("b*s.1*", "blocks.10", True),
    ("b*s.1*", "blocks.0.1", False),
    # everything else is meant literally
    ("a+", "aa", False),
    ("a+", "a+", True),
    ("a[01]", "a0", False),
    ("a[01]", "a[01].b", True),
    ("a|b", "b", False),
    ("(a)", "(a)", True),
    ("a?", "a", False),
    ("a?", "ab", False),
    ("^a$", "a", False),
    ("a\\*", "a\\b", True),
    ("a\\*", "ab", False),
    ("a.b", "axb", False),
    ("Attn", "attn", False),
    ("größe", "größe.x", True),
    ("", "a", False),
    ("", "", False),
    ("**.", "a", False),
    (".a", "a", False),
    ("a.", "a.b", False),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), TABLE)
def test_table(pattern: str, name: str, expected: bool) -> None:
    assert covers(pattern, name) is expected


def walk(pattern: list[str], name: list[str]) -> bool:
    """The rule again, segment by segment: whether a prefix of `name` matches all of `pattern`."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(walk(pattern[1:], name[skipped:]) for skipped in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and walk(pattern[1:], name[1:])


def test_agrees_with_a_walk_over_segments() -> None:
    chosen, counts = random.Random(0), [0, 0]
    names = [list(name) for length in range(5) for name in itertools.product(("a", "ab", "b"), repeat=length)]
    for _ in range(150):
        pattern = chosen.choices(("a", "ab", "b", "*", "**", "a*", "*b"), k=chosen.randrange(1, 5))
        for name in names:
            expected = walk(pattern, name)
            assert covers(".".join(pattern), ".".join(name)) is expected, (pattern, name)
            counts[expected] += 1
    assert min(counts) > 2000


@pytest.mark.own_process
def test_many_wildcards_are_quick() -> None:
    def cover() -> None:
        assert not covers(".".join(["**"] * 4 + ["x"]), ".".join(["a"] * 40))
        assert not covers("a**a***a*x", "a" * 60)

    assert quiet_seconds(cover) < 2


def test_covering_is_the_first_that_covers() -> None:
    assert covering(["b", "a.*", "a"], "a.x") == "a.*"
    assert covering(["b", "a.*"], "c") is None
    assert covering([], "a") is None


def test_keep_in_fp32_entries_are_meant_at_any_depth() -> None:
    assert covers(anywhere("norm"), "norm")
    assert covers(anywhere("norm"), "blocks.0.norm.linear")
    assert not covers(anywhere("norm"), "blocks.0.norm1")


NAMES = ["", "blocks", "blocks.0", "blocks.0.attn", "blocks.0.attn.to_q", "blocks.0.mlp", "proj_out"]


def test_patterns_that_match_pass() -> None:
    assert unmatched_patterns([], [], "skip_modules") == {}
    assert unmatched_patterns(["blocks.0", "**.to_q", "proj_*", "**"], NAMES, "skip_modules") == {}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("proj_ou", "did you mean proj_out?"),
        ("block.0.attn", "did you mean blocks.0.attn"),
        ("mlp", "did you mean blocks.0.mlp?"),  # one that lacks its path
        ("zzzzzzzz", "top-level modules are blocks, proj_out"),
        ("blocks.1", "did you mean blocks.0"),
        ("", "top-level modules are blocks, proj_out"),
    ],
)
def test_what_is_said_of_a_pattern_that_matches_nothing(pattern: str, hint: str) -> None:
    found = unmatched_patterns(["blocks", pattern], NAMES, "skip_modules of 'transformer'")
    assert list(found) == [pattern]
    message = found[pattern]
    assert message.startswith(f"skip_modules of 'transformer': the pattern {pattern!r} matches no module; ")
    assert hint in message
    assert "**.name" in message


def test_the_model_itself_is_no_match() -> None:
    """`**` matches the root, but a model without modules below it has nothing to skip."""
    assert "'**' matches no module" in unmatched_patterns(["**"], [""], "skip_modules")["**"]
