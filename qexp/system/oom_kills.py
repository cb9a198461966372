"""How many processes the kernel has killed for memory: a process that it kills sees only SIGKILL, as from anybody.

Each cgroup counts its own: `memory.events` of version 2, `memory.oom_control` of version 1. Where neither is there,
/proc/vmstat has the count of the whole machine.
Source: the kernel's Documentation/admin-guide/cgroup-v2.rst ("oom_kill": processes belonging to this cgroup killed by
any kind of OOM killer).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def count_oom_kills(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the count for this process's cgroup, else for the machine; None where nothing counts."""
    for file in (*_cgroup_files(proc, cgroups), proc / "vmstat"):
        if (count := _read_count(file)) is not None:
            return count
    return None


def _cgroup_files(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Return the files that may have the counts.

    In a container, the path may be the host's, and the mount the group itself.
    """
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            inside = path.lstrip("/")
            if "memory" in controllers.split(","):
                yield from (cgroups / "memory" / place / "memory.oom_control" for place in (inside, ""))
            elif number == "0":
                for mount in (cgroups, cgroups / "unified"):  # the second beside version 1
                    yield from (mount / place / "memory.events" for place in (inside, ""))


def _read_count(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None
