"""Try the faults of tests/mutations: put each into a copy of the repository and run the tests that should notice it.

    python scripts/try_mutations.py                                 # every fault
    python scripts/try_mutations.py --room loading --jobs 1
    python scripts/try_mutations.py --only arena-ranges-overlap
    python scripts/try_mutations.py --json after.json --table       # resumable; prints a Markdown table at the end

A fault meets up to three sets of tests, and is done with the first that fails:

    default   the fault's `first` file, then its room, as `scripts/check` runs them: without tests marked as exhaustive
              or external
    full      its room, all tests

The room of a fault in qexp/<room>/ is tests/<room>, unless its `tests` name other files. Each set must pass without a
fault before it counts; that run is made once. A run that takes much longer than without the fault is stopped, and
counts as caught. The exit code is 0 if every fault was caught.

The copy holds the files that git tracks, and new ones that it does not ignore, without tests/mutations; see
mutation_copies.py.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import queue
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation_copies import Copy, Run, Stopped, Tests, default_markers, files_of

from qexp.system.files import write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.mutations.faults import Fault, read_faults  # noqa: E402

STAGES = ("default", "full")
SLOWER = 3  # a run of more than so many times the seconds without the fault hangs


@dataclass(frozen=True)
class Result:
    """What became of a fault. stage: of STAGES, or "none" if every test passed; test: what noticed it."""

    file: str
    old: str
    new: str
    stage: str
    test: str
    seconds: float


class RedBaseline(Exception):
    """Tests fail without any fault, so that they tell nothing of one."""


class Trial:
    """Tries faults in copies of a repository, several at a time."""

    def __init__(self, copies: Sequence[Copy], timeout_seconds: float) -> None:
        self._copies = queue.SimpleQueue[Copy]()
        for copy in copies:
            self._copies.put(copy)
        self._timeout_seconds = timeout_seconds
        self._baselines: dict[Tests, Future[Run]] = {}
        self._lock = threading.Lock()

    def run(self, fault: Fault) -> Result:
        """Put a fault into a copy, and take it out again. Raises: RedBaseline if its tests fail without it."""
        copy = self._copies.get()
        try:
            return self._run(fault, copy)
        finally:
            self._copies.put(copy)

    def _run(self, fault: Fault, copy: Copy) -> Result:
        path, seconds = copy.root / fault.file, 0.0
        source = path.read_text(encoding="utf-8")
        if source.count(fault.old) != 1:
            raise SystemExit(f"{fault.name}: its old text occurs {source.count(fault.old)} times in {fault.file}")
        for tests in tests_of(fault, copy.root):
            limit = max(self._timeout_seconds, SLOWER * self._baseline(tests, copy).seconds)
            path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
            try:
                run = copy.run(tests, limit)
            finally:
                path.write_text(source, encoding="utf-8")
            seconds += run.seconds
            if run.test:
                return Result(fault.file, fault.old, fault.new, tests.stage, run.test, round(seconds, 1))
        return Result(fault.file, fault.old, fault.new, "none", "", round(seconds, 1))

    def _baseline(self, tests: Tests, copy: Copy) -> Run:
        """Return the run without a fault, made once. Raises: RedBaseline if a test fails."""
        with self._lock:
            is_first = tests not in self._baselines
            future = self._baselines.setdefault(tests, Future())
        if is_first:
            try:
                future.set_result(copy.run(tests, None))
            except BaseException as error:
                future.set_exception(error)
        run = future.result()
        if is_first:
            print(f"without a fault: {tests}: {run.test or 'passed'} ({run.seconds:.0f} s)", flush=True)
        if run.test:
            raise RedBaseline(f"{run.test} fails without any fault")
        return run


def tests_of(fault: Fault, root: Path) -> list[Tests]:
    """Return the sets of tests that a fault meets, as far as a repository has them."""
    first = tuple(path for path in (fault.first,) if path and (root / path).exists())
    targets = tuple(path for path in fault.targets if (root / path).exists()) or ("tests",)
    markers = default_markers(root)
    found = [Tests("default", paths, markers) for paths in (first, targets) if paths]
    return [*found, Tests("full", targets, "")] if markers else found


class Results:
    """The results so far, in a file that is whole at any moment."""

    def __init__(self, path: Path | None) -> None:
        self._path, self.by_name = path, dict[str, Result]()
        self._lock = threading.Lock()
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.by_name = {name: Result(**values) for name, values in stored["faults"].items()}

    def has(self, fault: Fault) -> bool:
        """Return whether there is a result of this fault, with the texts that it has now."""
        found = self.by_name.get(fault.name)
        return found is not None and (found.old, found.new) == (fault.old, fault.new)

    def add(self, name: str, result: Result) -> None:
        with self._lock:
            self.by_name[name] = result
            if self._path is not None:
                faults = {name: asdict(found) for name, found in sorted(self.by_name.items())}
                write_json(self._path, {"faults": faults})


def table(faults: Sequence[Fault], results: dict[str, Result]) -> str:
    """Markdown: a line for each fault that was tried, and how many were caught by what."""
    lines = ["| fault | file | caught by |", "| --- | --- | --- |"]
    tried = [(fault, results[fault.name]) for fault in faults if fault.name in results]
    for fault, result in tried:
        stage = "" if result.stage == "default" else f" ({result.stage})"
        by = "**no test**" if result.stage == "none" else f"`{result.test}`{stage}"
        lines.append(f"| {fault.name} | {fault.file} | {by} |")
    return "\n".join([*lines, "", summary([result for _, result in tried])])


def summary(results: Sequence[Result]) -> str:
    counts = Counter(result.stage for result in results)
    parts = [f"{counts[stage]} caught by the {stage} tests" for stage in STAGES if counts[stage] or stage == "default"]
    return f"{len(results)} faults: {', '.join(parts)}, {counts['none']} by none."


def chosen(faults: Sequence[Fault], names: Sequence[str], rooms: Sequence[str]) -> list[Fault]:
    """Return the faults of these names or rooms, all of them without any.

    Raises: SystemExit for one that is not there.
    """
    for asked, known in ((names, [fault.name for fault in faults]), (rooms, sorted({fault.room for fault in faults}))):
        for name in asked:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise SystemExit(f"there is no {name!r}{f'; did you mean {near[0]}?' if near else ''}")
    if not names and not rooms:
        return list(faults)
    return [fault for fault in faults if fault.name in names or fault.room in rooms]


def try_faults(
    root: Path, faults: Sequence[Fault], results: Results, *, jobs: int, timeout_seconds: float
) -> list[str]:
    """Try faults of the repository in `root`; returns what could not be judged, a line each."""
    files, problems = files_of(root), list[str]()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        count = max(min(jobs, len(faults)), 1)
        copies = [Copy(root, Path(folder, str(number)), files) for number in range(count)]
        trial = Trial(copies, timeout_seconds)

        def attempt(fault: Fault) -> None:
            try:
                result = trial.run(fault)
            except RedBaseline as error:
                problems.append(f"{fault.name}: {error}")
                return
            except Stopped:
                return
            results.add(fault.name, result)
            by = f"caught by {result.test}" if result.stage != "none" else "NOT CAUGHT"
            print(f"{fault.name}: {by} ({result.stage}, {result.seconds:.0f} s)", flush=True)

        with ThreadPoolExecutor(count) as pool:
            try:
                for future in [pool.submit(attempt, fault) for fault in faults]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in copies:
                    copy.stop()
                raise
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="faults by their names")
    parser.add_argument("--room", nargs="+", default=[], help="faults by their rooms, such as loading or scripts")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="faults at a time (default: cores)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds of a run that hangs, at least (default: 300)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep results in a file, and try only what it lacks")
    parser.add_argument("--again", action="store_true", help="try faults that OUT has results of, too")
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the results at the end")
    arguments = parser.parse_args()
    faults = chosen(read_faults(), arguments.only, arguments.room)
    results = Results(arguments.json)
    left = [fault for fault in faults if arguments.again or not results.has(fault)]
    problems = try_faults(ROOT, left, results, jobs=arguments.jobs, timeout_seconds=arguments.timeout) if left else []
    tried = [results.by_name[fault.name] for fault in faults if results.has(fault)]
    print(f"\n{table(faults, results.by_name)}" if arguments.table else f"\n{summary(tried)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or any(result.stage == "none" for result in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
