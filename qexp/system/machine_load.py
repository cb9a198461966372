"""What else ran on the machine for a while: times that were taken meanwhile are slower for it.

CPU time of the whole machine (/proc/stat, with steal: what other guests of its host took) less that of this process,
its children that have ended, and the writer of W&B's logs, whose priority is low. The processes that took most are
named, as far as this one sees them: in a container, those of the container.
Source: man 5 proc_stat, proc_pid_stat, proc_loadavg; the kernel's Documentation/admin-guide/cgroup-v2.rst (cpu.max)
and scheduler/sched-bwc.rst (cpu.cfs_quota_us, of version 1).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
IDLE = (3, 4)  # fields of /proc/stat: idle, iowait
COUNTED = 8  # fields of it: guest time, behind them, is in user time too
LOG_WRITER = b"qexp.sweep.log_writer"
NAMED = 3
LEAST_CORES = 0.05  # of a process that is named


@dataclass(frozen=True)
class _Reading:
    clock: float
    machine_seconds: float
    own_seconds: float
    processes: dict[tuple[int, int], tuple[str, float]]  # (number, ticks at which it began) -> name, CPU seconds


class MachineLoad:
    """Watches inside a `with` block. After it: other_cores, load_average, beside; None where there is no /proc."""

    def __init__(self, proc: Path = PROC) -> None:
        self.proc = proc
        self.other_cores: float | None = None
        self.load_average: float | None = None
        self.beside: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self.first = _read(self.proc)
        return self

    def __exit__(self, *_: object) -> None:
        last = _read(self.proc)
        if self.first is None or last is None:
            return
        seconds = max(last.clock - self.first.clock, 1e-9)
        writers, others = 0.0, list[tuple[float, str]]()
        for who, (name, cpu) in last.processes.items():
            cores = (cpu - self.first.processes.get(who, ("", 0.0))[1]) / seconds
            if cores > 0 and _is_log_writer(self.proc / str(who[0])):  # most did nothing: their command is not read
                writers += cores
            else:
                others.append((cores, name))
        total = last.machine_seconds - self.first.machine_seconds
        own = last.own_seconds - self.first.own_seconds
        self.other_cores = max((total - own) / seconds - writers, 0.0)
        self.load_average = float((self.proc / "loadavg").read_text(encoding="utf-8").split()[0])
        most = sorted(others, reverse=True)[:NAMED]
        self.beside = [{"name": name, "cores": round(cores, 2)} for cores, name in most if cores >= LEAST_CORES]

    def metrics(self) -> dict[str, float | None]:
        """Return the `time/` metrics of what ran beside; none where that cannot be known."""
        if self.other_cores is None:
            return {}
        return {"time/other_cores": self.other_cores, "time/load_average": self.load_average}


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Return how many cores this process may use: those it is bound to, or a cgroup's quota if that is less."""
    return min([bound_cores(), *_quotas(proc, cgroups)])


def usable_threads() -> int:
    """Return a thread for each core that this process may use; of a quota of 1.5 cores, two use all."""
    return max(math.ceil(usable_cores()), 1)


def bound_cores() -> int:
    """Return how many cores this process is bound to, whatever its quota: as many threads as libraries start."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """Yield the cores of the cgroup and of those above it; the least counts.

    In a container, the path may be the host's, and the mount the group itself.
    """
    with suppress(OSError, ValueError):
        for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            is_v1 = "cpu" in controllers.split(",")
            mounts = [cgroups / name for name in ("cpu", controllers)] if is_v1 else [cgroups]  # cpu may be a link
            root = next((mount for mount in mounts if mount.is_dir()), mounts[0])
            own = root / path.lstrip("/")
            places = [own, *own.parents] if is_v1 or number == "0" else []
            for place in (place for place in places if place.is_relative_to(root)):
                with suppress(OSError, ValueError):
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_v1 else ("cpu.max",)
                    words = [word for name in names for word in (place / name).read_text(encoding="utf-8").split()]
                    quota, period = map(int, words)  # "max", or -1 in version 1, is none
                    if quota > 0:
                        yield quota / period


def _read(proc: Path) -> _Reading | None:
    try:
        numbers = [int(word) for word in (proc / "stat").read_text(encoding="utf-8").split("\n")[0].split()[1:]]
        hertz = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    busy = sum(number for place, number in enumerate(numbers[:COUNTED]) if place not in IDLE)
    return _Reading(time.perf_counter(), busy / hertz, sum(os.times()[:4]), dict(_processes(proc, hertz)))


def _processes(proc: Path, hertz: int) -> Iterator[tuple[tuple[int, int], tuple[str, float]]]:
    for folder in proc.glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with suppress(OSError, ValueError, IndexError):  # it has ended
            name, _, rest = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
            fields = rest.split()
            seconds = (int(fields[11]) + int(fields[12])) / hertz
            yield (int(folder.name), int(fields[19])), (name.partition("(")[2], seconds)


def _is_log_writer(folder: Path) -> bool:
    with suppress(OSError):  # it has ended
        return LOG_WRITER in (folder / "cmdline").read_bytes()
    return False
