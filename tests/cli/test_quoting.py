"""What a message says to type is what Hydra reads as the text that was meant."""

import shlex

import pytest

from qexp.cli.quoting import is_unbalanced, quoted
from tests.assigning import assigned

TEXTS = [
    "/data/grüße", "a#b", "it's", "wow!", "a,b", "{a: 1}", "[x", "x=y", "${}", "${seed}", "a\\b", 'say "hi"', 'end\\"x',
    "/x/$HOME", "a b  c", "~/models", "f(x)", "a;b&c|d", "日本", "tail\\",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_quoted_override_has_the_text_as_its_value(text: str) -> None:
    (typed,) = shlex.split(quoted(f"sweep.notes={text}"))
    assert assigned(typed).sweep.notes == text


@pytest.mark.parametrize(("value", "meant"), [("'abc", "abc"), ('"a b', "a b"), ("'", "")])
def test_quote_that_is_not_closed_is_left_out(value: str, meant: str) -> None:
    (typed,) = shlex.split(quoted(f"sweep.notes={value}"))
    assert assigned(typed).sweep.notes == meant
    assert is_unbalanced(f"sweep.notes={value}")


@pytest.mark.parametrize("value", ["abc", "'abc'", '"a b"', "a'b'c"])
def test_closed_quotes_are_balanced(value: str) -> None:
    assert not is_unbalanced(f"sweep.notes={value}")
