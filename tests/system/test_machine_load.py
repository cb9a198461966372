"""What ran beside, from a /proc of the test's own, and from this machine's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qexp.system import machine_load
from qexp.system.machine_load import MachineLoad, usable_cores, usable_threads

HERTZ = os.sysconf("SC_CLK_TCK")


def write_proc(proc: Path, busy: float, processes: dict[int, tuple[str, str, float]]) -> None:
    """busy: CPU seconds of the machine; processes: number -> name, command line, CPU seconds."""
    user, steal = int(busy * HERTZ) - 7, 7
    (proc / "stat").write_text(f"cpu {user} 0 0 99999 99999 0 0 {steal} 55555 0\ncpu0 1 2 3\n")
    (proc / "loadavg").write_text("3.25 1.00 0.50 2/100 4242\n")
    for number, (name, command, seconds) in processes.items():
        (proc / str(number)).mkdir(exist_ok=True)
        fields = ["S", *["0"] * 10, str(int(seconds * HERTZ)), "0", *["0"] * 6, "77", "0"]
        (proc / str(number) / "stat").write_text(f"{number} ({name}) {' '.join(fields)}")
        (proc / str(number) / "cmdline").write_text(command.replace(" ", "\0"))


def test_other_cores_are_the_machines_less_ones_own_and_the_log_writers(tmp_path, monkeypatch) -> None:
    clock, own = iter([100.0, 110.0]), iter([(1.0, 0, 0, 0, 0), (5.0, 1.0, 1.0, 1.0, 0)])
    monkeypatch.setattr(machine_load.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine_load.os, "times", lambda: next(own))
    writer = "python -m qexp.sweep.log_writer --parent 1"
    write_proc(tmp_path, 50, {10: ("cc (1) x", "cc1 -O2", 3.0), 11: ("python", writer, 0.0), 12: ("idle", "idle", 9.0)})
    with MachineLoad(tmp_path) as load:
        changed = {10: ("cc (1) x", "cc1 -O2", 12.0), 11: ("python", writer, 2.0), 13: ("late", "late", 4.0)}
        write_proc(tmp_path, 80, changed)
    # in 10 s the machine worked for 30, this process for 1 + (5 - 1) + 1 + 1 = 7 of them, the writer for 2
    assert load.other_cores == pytest.approx(2.1)
    assert load.load_average == 3.25
    assert load.beside == [{"name": "cc (1) x", "cores": 0.9}, {"name": "late", "cores": 0.4}]
    assert load.metrics() == {"time/other_cores": load.other_cores, "time/load_average": 3.25}


def test_command_lines_are_read_of_processes_that_worked(tmp_path, monkeypatch) -> None:
    """On a machine with thousands of processes, most of which sleep, reading them all takes tens of milliseconds."""
    asked = []

    def is_log_writer(folder: Path) -> bool:
        asked.append(folder.name)
        return False

    monkeypatch.setattr(machine_load, "_is_log_writer", is_log_writer)
    write_proc(tmp_path, 50, {10: ("cc", "cc", 3.0), 12: ("idle", "idle", 9.0)})
    with MachineLoad(tmp_path):
        write_proc(tmp_path, 80, {10: ("cc", "cc", 12.0), 12: ("idle", "idle", 9.0), 13: ("late", "late", 4.0)})
    assert sorted(asked) == ["10", "13"]


def test_without_proc_nothing_is_claimed(tmp_path) -> None:
    with MachineLoad(tmp_path) as load:
        pass
    assert load.metrics() == {} and load.beside == []


def test_a_process_that_works_beside_is_seen_and_named() -> None:
    code = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        with MachineLoad() as load:
            time.sleep(1.0)
    finally:
        other.kill()
        other.wait()
    assert load.other_cores is not None and load.other_cores > 0.05  # of a machine that may be busy otherwise, too
    assert load.beside


@pytest.mark.parametrize(("limit", "cores"), [("50000 100000", 0.5), ("max 100000", None), (None, None)])
def test_a_quota_of_the_cgroup_counts(limit: str | None, cores: float | None, tmp_path) -> None:
    group = tmp_path / "cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/a/b\n")
    if limit is not None:
        (group / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores(tmp_path, tmp_path / "cgroup") == (cores or len(os.sched_getaffinity(0)))


def write_groups(tmp_path: Path, line: str, files: dict[str, str]) -> Path:
    """A /proc whose process is in the cgroup of `line`, and the mount of cgroups with these files."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(line)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    return tmp_path / "cgroup"


def test_quota_of_a_group_above_counts(tmp_path) -> None:
    """A pod's limit is on the group above its containers'."""
    files = {"pod/cpu.max": "25000 100000", "pod/one/cpu.max": "max 100000", "cpu.max": "90000 100000"}
    assert usable_cores(tmp_path, write_groups(tmp_path, "0::/pod/one\n", files)) == 0.25


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])  # one is a link to the other, where there is a link
@pytest.mark.parametrize("place", ["/box", ""])  # in a container the mount is the group itself
@pytest.mark.parametrize(("quota", "cores"), [("30000", 0.3), ("-1", None)])
def test_quota_of_cgroups_version_1_counts(quota: str, cores: float | None, place: str, mount: str, tmp_path) -> None:
    lines = "4:memory:/other\n2:cpu,cpuacct:/box\n0::/\n"
    files = {f"{mount}{place}/cpu.cfs_quota_us": f"{quota}\n", f"{mount}{place}/cpu.cfs_period_us": "100000\n"}
    groups = write_groups(tmp_path, lines, files)
    assert usable_cores(tmp_path, groups) == (cores or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("cores", "threads"), [(0.25, 1), (1.0, 1), (1.5, 2), (2, 2)])
def test_threads_use_all_of_a_quota(cores: float, threads: int, monkeypatch) -> None:
    monkeypatch.setattr(machine_load, "usable_cores", lambda: cores)
    assert usable_threads() == threads


def test_cores_that_a_process_is_not_bound_to_do_not_count() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from qexp.system.machine_load import bound_cores, usable_threads; print(bound_cores(), usable_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
