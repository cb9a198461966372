"""Count what makes code slow to read: names with two meanings, functions without an object, and missing comments.

    python scripts/count_names.py              the working tree
    python scripts/count_names.py HEAD~20      any commit

A row is a folder of qexp/: its lines of code (without docstrings, comments, blank lines); how many functions and
classes at the top level of its files have a name that another file of qexp/ defines too; its functions and methods; how
many of them have a name of one word; its comments for 100 lines of code. Names that are not chosen are left out
(special methods, properties, overrides, overloads, `main`), and so are comments for tools (noqa, type: ignore, fmt).
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOR_TOOLS = re.compile(r"#\s*(noqa|type:|fmt:|pragma)")
NOT_CHOSEN = {"property", "cached_property", "override", "overload", "setter"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class RoomCounts:
    """names: those at the top level of files, with the files that define each."""

    code_lines: int = 0
    comments: int = 0
    functions: int = 0
    one_word: int = 0
    names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def count_file(path: str, text: str, counts: RoomCounts) -> None:
    """Add what a file has to the counts of its room."""
    tree = ast.parse(text)
    docstrings = {line for node in ast.walk(tree) for line in docstring_lines(node)}
    code = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
        counts.comments += token.type == tokenize.COMMENT and not FOR_TOOLS.match(token.string)
    counts.code_lines += len(code - docstrings)
    for name in chosen_names(tree):
        counts.functions += 1
        counts.one_word += "_" not in name.strip("_")
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and node.name != "main":
            counts.names[node.name].add(path)


def docstring_lines(node: ast.AST) -> range:
    """Return the lines of a node's docstring; none if it has none."""
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or ast.get_docstring(node, clean=False) is None:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def chosen_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of functions and methods that their author chose."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and not node.name.startswith("__") and node.name != "main":
            decorators = {str(getattr(one, "attr", getattr(one, "id", ""))) for one in node.decorator_list}
            if not decorators & NOT_CHOSEN:
                yield node.name


def sources(commit: str | None) -> Iterator[tuple[str, str]]:
    """(path, text) of every Python file of qexp/, in the working tree or a commit."""
    if commit is None:
        for file in sorted((ROOT / "qexp").rglob("*.py")):
            yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
        return
    archive = subprocess.run(["git", "archive", commit, "qexp"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            if member.name.endswith(".py") and (content := members.extractfile(member)) is not None:
                yield member.name, content.read().decode()


def table(rooms: dict[str, RoomCounts]) -> str:
    """Return one line a room, and one for all."""
    files = Counter(name for counts in rooms.values() for name, paths in counts.names.items() for _ in paths)
    lines = ["room          code lines  names in 2+ files  functions  one word  comments / 100 lines"]
    total, shared = RoomCounts(), {name for name, number in files.items() if number > 1}
    for room, counts in sorted(rooms.items()):
        lines.append(row(room, counts, len(shared & counts.names.keys())))
        for name in ("code_lines", "comments", "functions", "one_word"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
    return "\n".join([*lines, row("all", total, len(shared))])


def row(room: str, counts: RoomCounts, shared: int) -> str:
    one_word = f"{counts.one_word} ({100 * counts.one_word / max(counts.functions, 1):.0f} %)"
    comments = 100 * counts.comments / max(counts.code_lines, 1)
    return f"{room:<13} {counts.code_lines:>10,} {shared:>18} {counts.functions:>10} {one_word:>10} {comments:>10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what git calls a commit; the working tree if left out")
    commit = parser.parse_args().commit
    if commit is not None and subprocess.run(["git", "rev-parse", "-q", "--verify", f"{commit}^{{commit}}"], cwd=ROOT,
                                             stdout=subprocess.DEVNULL, check=False).returncode:  # fmt: skip
        parser.error(f"{commit} is no commit; `git log --oneline` lists them")
    rooms: dict[str, RoomCounts] = defaultdict(RoomCounts)
    for path, text in sources(commit):
        parts = path.split("/")
        count_file(path, text, rooms[parts[1] if len(parts) > 2 else "(top)"])
    print(table(rooms))


if __name__ == "__main__":
    main()
