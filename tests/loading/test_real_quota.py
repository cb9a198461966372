"""How many workers load a model in a cgroup with a CPU quota, as in a container: a real one, which takes root."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MOUNT = Path("/sys/fs/cgroup")
PERIOD = 100_000
CODE = """
import json
import qexp
from qexp.loading.streaming import stream

counts, running = [], stream._running
stream._running = lambda targets, halt: (counts.append(len(targets)), running(targets, halt))[1]
qexp.load("arithmetic", "bitsandbytes", device="cpu")
print(json.dumps(counts))
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A new cgroup of this test's own, of version 1 or 2, whose CPU quota can be set."""
    is_v1 = (MOUNT / "cpu/cpu.cfs_quota_us").is_file()
    folder = (MOUNT / "cpu" if is_v1 else MOUNT) / f"qexp-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error.strerror}")
    try:
        if not is_v1 and not (folder / "cpu.max").is_file():
            pytest.skip("the cpu controller of cgroups is not given to groups below the root")
        yield folder
    finally:
        folder.rmdir()


def set_quota(group: Path, cores: float) -> None:
    if (group / "cpu.max").is_file():
        (group / "cpu.max").write_text(f"{int(cores * PERIOD)} {PERIOD}", encoding="utf-8")
        return
    (group / "cpu.cfs_period_us").write_text(str(PERIOD), encoding="utf-8")
    (group / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD)), encoding="utf-8")


def workers(group: Path | None) -> list[int]:
    """How many workers each stream of weights has in a process of this group."""
    join = [] if group is None else ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    command = [*join, sys.executable, "-c", CODE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.external
def test_a_load_has_a_worker_for_each_core_of_its_quota(group: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("one core has one worker, with a quota or without")
    assert workers(None) == [cores]
    set_quota(group, 0.75)
    assert workers(group) == [1]
    set_quota(group, 1.5)
    assert workers(group) == [2]
