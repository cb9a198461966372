import contextlib
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LINES = [entry["line"] for entry in yaml.safe_load((ROOT / "tests/cli/mistakes.yaml").read_text(encoding="utf-8"))]
# what a message has to have besides the value: what is valid, or what to do
REMEDY = re.compile(
    r"\b(use|give|set|write|choose|add|save|put|must|needs?|has|have|it takes|valid here|download|convert|wait|run"
    r"|leave|not found|required|unrecognized|is quoted)\b"
)


def answers(lines: list[str], folder: Path) -> dict[str, tuple[int, str]]:
    import list_mistakes

    with contextlib.chdir(folder):
        list_mistakes.write_files(folder)
        return {line: list_mistakes.answer(line) for line in lines}


def check(found: dict[str, tuple[int, str]]) -> None:
    page = (ROOT / "docs/mistakes.md").read_text(encoding="utf-8")
    for line, (code, text) in found.items():
        assert code in (1, 2), line
        assert "Traceback" not in text and "Could not" not in text, text
        assert REMEDY.search(text), text
        if sys.version_info[:2] == (3, 11):  # argparse words its messages anew from version to version
            assert f"$ qexp {line}\n{text}\n" in page, (
                f"{line}: python scripts/list_mistakes.py writes docs/mistakes.md anew"
            )


def test_there_are_a_hundred_mistakes_and_the_page_has_them_all() -> None:
    page = (ROOT / "docs/mistakes.md").read_text(encoding="utf-8")
    assert len(set(LINES)) == len(LINES) >= 100
    assert [line for line in LINES if f"$ qexp {line}\n" not in page] == []


def test_every_twentieth_mistake_is_answered_as_the_page_says(tmp_path) -> None:
    check(answers(LINES[::20], tmp_path))


@pytest.mark.exhaustive
def test_all_mistakes_are_answered_as_the_page_says(tmp_path) -> None:
    check(answers(LINES, tmp_path))
