"""What makes rows of a table hard to compare: a busy machine, and an environment that is not that of the others.

*   other programs kept more than a tenth of the cores busy that the experiment may use, so that its times are those
    of that moment
†   library versions, commit, threads or machine are not those of most rows
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qexp.results.rows import Row

BUSY_SHARE = 0.1
BUSY, OTHER = "*", "†"
MACHINE = ("host", "cpu", "cores", "threads", "device", "device_name", "python", "commit")


def members_of(row: Row) -> list[Row]:
    """Return the runs in a row: several where they differ in their seed alone."""
    return list(row.get("members", [row]))


def busy_cores(row: Row) -> float | None:
    """Return the cores that others kept busy beside the busiest run of a row; None if no time suffers from that."""
    found = [cores for run in members_of(row) if (cores := _busy_cores(run)) is not None]
    return max(found, default=None)


def _busy_cores(run: Row) -> float | None:
    others, env = run["metrics"].get("time/other_cores"), run.get("env") or {}
    cores = env.get("usable_cores") or env.get("cores")
    return others if others is not None and cores and others > BUSY_SHARE * cores else None


def differing_environments(rows: Sequence[Row]) -> dict[int, str]:
    """Number of a run -> how its environment differs from that of most: 'torch 2.12.0 (most: 2.13.0)'.

    Versions count where both have them: each experiment names only the libraries it uses.
    """
    runs = [run for row in rows for run in members_of(row) if run.get("env")]
    found = {run["number"]: _compared(run["env"]) for run in runs}
    usual = {
        name: Counter(values[name] for values in found.values() if name in values).most_common(1)[0][0]
        for name in dict.fromkeys(name for values in found.values() for name in values)
    }
    texts = {
        number: ", ".join(
            f"{name} {values[name]} (most: {usual[name]})" for name in values if values[name] != usual[name]
        )
        for number, values in found.items()
    }
    return {number: text for number, text in texts.items() if text}


def _compared(env: Mapping[str, Any]) -> dict[str, str]:
    versions = {name: version for name, version in (env.get("versions") or {}).items() if version is not None}
    machine = {name: env[name] for name in MACHINE if env.get(name) is not None}
    return {name: _shown(name, value) for name, value in {**machine, **versions}.items()}


def versions_of_runs(environments: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return package -> its versions in all of these runs, sorted by package."""
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for package, version in (environment.get("versions") or {}).items():
            if version is not None:
                found.setdefault(package, {})[str(version)] = None
    return {package: [*versions] for package, versions in sorted(found.items())}


def _shown(name: str, value: object) -> str:
    return str(value)[:12] + "+" * str(value).endswith("+") if name == "commit" else str(value)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Explain the marks in a table of these rows, a line each."""
    busy = {run["number"]: cores for row in rows for run in members_of(row) if (cores := _busy_cores(run)) is not None}
    lines = []
    if busy:
        ends = dict.fromkeys(f"{cores:.1f}" for cores in (min(busy.values()), max(busy.values())))
        numbers = ", ".join(f"#{number}" for number in sorted(busy))
        lines.append(f"{BUSY} times were taken while other programs kept {' to '.join(ends)} cores busy: {numbers}")
    differing: dict[str, list[int]] = {}
    for number, text in sorted(differing_environments(rows).items()):
        differing.setdefault(text, []).append(number)
    lines += [f"{OTHER} {', '.join(f'#{n}' for n in numbers)}: {text}" for text, numbers in differing.items()]
    return lines
