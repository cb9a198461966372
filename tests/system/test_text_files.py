"""Text files of users, read alike everywhere: UTF-8 with or without a mark, lines that end at line feeds alone."""

import ast
from pathlib import Path
from typing import Any

import pytest

from qexp.config.generate import read_prompts
from qexp.config.module_patterns import patterns
from qexp.errors import ConfigError
from qexp.models.causal_lm import CausalLMConfig, Source
from qexp.system.text_files import read_lines, read_text
from qexp.tasks import input_files

ROOT = Path(__file__).parents[2]
# what str.splitlines, or newline=None, ends lines at
INSIDE = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r")


@pytest.mark.parametrize("letter", INSIDE, ids=ascii)
def test_no_letter_but_the_line_feed_ends_a_line(letter: str, tmp_path: Path) -> None:
    file, text = tmp_path / "p.txt", f"ü{letter}a\nb\n"
    file.write_bytes(text.encode())
    expected = [f"ü{letter}a", "b"]
    assert read_lines(file, "place", "remedy") == expected
    assert read_prompts(f"@{file}") == tuple(expected)
    assert input_files.read_lines(input_files.ForwardConfig(inputs=str(file))) == expected
    assert Source(CausalLMConfig()).text(str(file)) == text


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        (b"one\r\n\r\ntwo\n", ["one", "", "two"]),
        ("a\ufeffb\n".encode(), ["a\ufeffb"]),  # a mark that is not at the begin is a letter
        (b"", []),
    ],
)
def test_marks_and_carriage_returns_are_no_text(raw: bytes, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(raw)
    assert read_lines(tmp_path / "x.txt", "place", "remedy") == lines


def test_patterns_are_read_so_too(tmp_path: Path) -> None:
    (tmp_path / "skip").write_bytes(b"\xef\xbb\xbfblocks.0  # first\r\nhead\r\n")
    assert patterns(f"@{tmp_path / 'skip'}", "skip_modules") == ("blocks.0", "head")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("ü".encode("latin-1"), "it is not UTF-8 text \\(byte 0 is 0xfc\\)"),
        ("text".encode("utf-16"), "it is not UTF-8 text \\(byte 0 is 0xff\\)"),
        (None, "No such file"),
    ],
)
def test_what_is_no_such_text_is_refused_with_place_and_remedy(raw: Any, words: str, tmp_path: Path) -> None:
    if raw is not None:
        (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ConfigError, match=f"^task.text=x cannot be read: {words}.*; give another"):
        read_text(tmp_path / "x", "task.text=x", "give another")


def test_every_text_that_is_opened_has_an_encoding() -> None:
    """Without one it is the locale's: a prompt would be another one on another machine."""
    wrong = []
    for path in [*ROOT.glob("qexp/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text(node) and not any(k.arg == "encoding" for k in node.keywords):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def _is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text: by its name, and the mode that it is given."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "read_text" and isinstance(call.func, ast.Attribute):
        return not (isinstance(call.func.value, ast.Name) and call.func.value.id == "text_files")
    if name == "write_text" and isinstance(call.func, ast.Attribute):
        return len(call.args) == 1  # RunFolder's takes a name, too
    if any(key.arg == "text" and getattr(key.value, "value", None) is True for key in call.keywords):
        return True
    modes = [item.value for item in call.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return name in ("open", "fdopen") and any(mode.strip("+") in ("r", "w", "a", "x") for mode in modes)
