"""One-line faults of the program: bugs that the tests must notice when `scripts/try_mutations.py` puts them in.

Each `*.toml` of this folder has the faults of one room, as `[[fault]]` tables with the fields of `Fault`.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGE = "qexp"


@dataclass(frozen=True)
class Fault:
    """A change of one file that a test must notice.

    name: kebab-case, unique, says what goes wrong.
    file: path from the repository's root.
    old, new: `old` occurs once in the file; the fault puts `new` in its place.
    why: what a user would see, one sentence.
    undoes: the commit whose fix the fault takes back, as "<short hash> <subject>"; empty if there is none.
    tests: pytest targets that should notice it; empty: the tests of the file's room.
    first: the test file most likely to notice it, which runs before the other targets.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    undoes: str = ""
    tests: tuple[str, ...] = ()
    first: str = ""

    @property
    def room(self) -> str:
        """The folder of the package that the file is in; for files beside these folders the folder they are in."""
        parts = Path(self.file).parts
        return parts[1] if parts[0] == PACKAGE and len(parts) > 2 else parts[0]

    @property
    def targets(self) -> tuple[str, ...]:
        """The tests that should notice the fault."""
        return self.tests or (f"tests/{self.room}",)


def read_faults(folder: Path = FOLDER) -> list[Fault]:
    """Return all faults, in the order of their files and of the tables in them.

    Raises: ValueError for a table with other fields than `Fault` has.
    """
    faults = []
    for path in sorted(folder.glob("*.toml")):
        for values in tomllib.loads(path.read_text(encoding="utf-8")).get("fault", []):
            try:
                faults.append(Fault(**{**values, "tests": tuple(values.get("tests", ()))}))
            except TypeError as error:
                raise ValueError(f"{path}: {values.get('name', 'a fault without a name')}: {error}") from None
    return faults
