"""Counts of kills for memory, in the layouts of both versions of cgroups, inside and outside of containers."""

from pathlib import Path

import pytest

from qexp.system.files import write_text
from qexp.system.oom_kills import count_oom_kills

V2 = "0::/user/job\n"
V1 = "4:cpu,memory:/user/job\n0::/\n"
EVENTS = "low 0\noom 9\noom_kill 3\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
VMSTAT = "pgfault 1\noom_kill 7\n"


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        (V2, {"user/job/memory.events": EVENTS}, 3),
        (V2, {"memory.events": EVENTS}, 3),  # a container: the mount is the group
        (V2, {"unified/user/job/memory.events": EVENTS}, 3),
        (V1, {"memory/user/job/memory.oom_control": CONTROL}, 5),
        (V1, {"memory/memory.oom_control": CONTROL}, 5),
        (V1, {"memory/memory.oom_control": "oom_kill_disable 0\n"}, 7),  # a kernel before 4.13
        (V2, {}, 7),
    ],
)
def test_the_count_is_that_of_the_cgroup_else_of_the_machine(
    own: str, files: dict[str, str], count: int, tmp_path: Path
) -> None:
    write_text(tmp_path / "proc/self/cgroup", own)
    write_text(tmp_path / "proc/vmstat", VMSTAT)
    for name, content in files.items():
        write_text(tmp_path / "cgroups" / name, content)
    assert count_oom_kills(tmp_path / "proc", tmp_path / "cgroups") == count


def test_without_any_count_it_is_not_known(tmp_path: Path) -> None:
    assert count_oom_kills(tmp_path, tmp_path) is None
