"""The faults fit today's code: whoever moves or rewrites it meets them here."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.mutations.faults import PACKAGE, Fault, read_faults

ROOT = Path(__file__).parents[2]


def test_faults_are_many_and_some_undo_a_fix() -> None:
    faults = read_faults()
    assert len(faults) >= 60
    assert sum(bool(fault.undoes) for fault in faults) >= 20


def test_every_room_has_a_fault() -> None:
    rooms = {path.parent.name for path in (ROOT / PACKAGE).glob("*/*.py")}
    assert rooms - {fault.room for fault in read_faults()} == set()


def test_names_are_unique_and_in_kebab_case() -> None:
    names = Counter(fault.name for fault in read_faults())
    assert [name for name, count in names.items() if count > 1] == []
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []


def test_each_fault_changes_one_place_and_names_tests_that_exist() -> None:
    assert [problem for fault in read_faults() for problem in problems(fault)] == []


def problems(fault: Fault) -> Iterator[str]:
    """What keeps a fault from being tried."""
    path = ROOT / fault.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (count := source.count(fault.old)) != 1:
        yield f"{fault.name}: its old text occurs {count} times in {fault.file}"
    elif fault.new == fault.old:
        yield f"{fault.name}: its new text is the old one"
    else:
        compile(source.replace(fault.old, fault.new), fault.file, "exec")
    if not fault.why.endswith("."):
        yield f"{fault.name}: why is no sentence"
    for test in (*fault.targets, fault.first):
        if test and not (ROOT / test).exists():
            yield f"{fault.name}: there is no {test}"
