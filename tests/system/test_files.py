import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qexp.errors import DiskError
from qexp.results.run_folder import RunFolder, Status, is_alive, now_iso, start_ticks
from qexp.system import files
from qexp.system.files import file_lock, read_json, replacing, write_json, write_text

ROOT = Path(__file__).parents[2]


def failing(code: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code, remedy", [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable")])
def test_a_disk_that_takes_nothing_keeps_the_old_file_and_leaves_no_half(step, code, remedy, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_text(path, "old")
    if step == "open":
        monkeypatch.setattr(Path, "write_bytes", failing(code))
    else:
        monkeypatch.setattr(os, step, failing(code))
    with pytest.raises(DiskError) as caught:
        write_text(path, "new")
    monkeypatch.undo()
    message = str(caught.value)
    assert str(path) in message and remedy in message and "paths.outputs" in message
    assert os.strerror(code) in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


def test_an_error_while_writing_leaves_nothing(tmp_path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "x") as beside:
        beside.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"psnr": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path) -> None:
    path = tmp_path / "result.json"
    code = """
import sys; from pathlib import Path; from qexp.system.files import write_json
path = Path(sys.argv[1]); print("go", flush=True)
while True:
    for letter in "ab": write_json(path, {"value": letter * 100_000})
"""
    sizes = set()
    for delay in (0.0, 0.003, 0.01, 0.02):
        writer = start(code, path)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        value = read_json(path)["value"]
        sizes.add((len(value), len(set(value))))
    assert sizes == {(100_000, 1)}


def test_damaged_json_names_file_and_remedy(tmp_path) -> None:
    (tmp_path / "status.json").write_text('{"status": ')
    with pytest.raises(DiskError, match=r"status\.json.*damaged.*run it again"):
        RunFolder(tmp_path).read_status()
    assert RunFolder(tmp_path / "nothing").read_status() is None


def test_running_means_running_only_while_its_process_lives(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    worker = start("import time; time.sleep(60)")
    folder.write_status(Status("running", worker.pid, now_iso()))
    assert folder.read_status().status == "running"
    worker.kill()
    worker.communicate()
    status = folder.read_status()
    assert (status.status, status.reason) == ("failed", "signal")
    assert str(worker.pid) in status.message


def test_a_later_process_with_the_same_number_is_not_the_one_that_ran() -> None:
    assert is_alive(os.getpid(), now_iso())
    assert not is_alive(os.getpid(), "2020-01-01T00:00:00.000+00:00")


def test_a_process_is_recognized_whatever_the_clock_says() -> None:
    """A status from before a backward step of the clock, or after one, is of the process that wrote it."""
    ticks = start_ticks(os.getpid())
    for started in ("1999-01-01T00:00:00.000+00:00", "2999-01-01T00:00:00.000+00:00"):
        assert is_alive(os.getpid(), started, ticks)
        assert not is_alive(os.getpid(), started, ticks - 1)


def test_the_start_of_a_process_is_read_behind_its_name(tmp_path) -> None:
    """The kernel puts the name in parentheses, which it may have itself."""
    named = tmp_path / "a) b (c"
    shutil.copy(shutil.which("sleep"), named)
    with subprocess.Popen([named, "60"]) as process:
        expected = psutil.Process(process.pid).create_time() - psutil.boot_time()
        assert abs(start_ticks(process.pid) / os.sysconf("SC_CLK_TCK") - expected) < 1
        process.kill()
    assert start_ticks(process.pid) is None


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, now_iso())
    child.wait()


def test_a_new_attempt_finds_an_empty_folder_but_for_the_tracker_s_files(tmp_path) -> None:
    folder = RunFolder(tmp_path / "run")
    for name in ("status.json", "outputs.safetensors", "images/grid.png", "wandb/run-1/files/x", ".result.json.9.tmp"):
        write_text(folder.path / name, "x")
    with folder.locked(print):
        folder.clear()
    assert sorted(entry.name for entry in folder.path.iterdir()) == [".lock", "wandb"]
    assert (folder.path / "wandb/run-1/files/x").exists()


def test_scratch_is_removed_and_results_are_not(tmp_path) -> None:
    for name in ("result.json", ".lock", ".result.json.9.tmp", "images/.grid.png.9.tmp", "offload/w", "wandb/.hidden"):
        write_text(tmp_path / name, "x")
    RunFolder(tmp_path).remove_scratch()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"result.json", ".lock", "wandb/.hidden"}


def test_a_lock_lets_one_in_at_a_time_and_says_that_it_waits(tmp_path) -> None:
    inside, most, waited = 0, 0, []

    def enter() -> None:
        nonlocal inside, most
        with RunFolder(tmp_path / "run").locked(waited.append):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert 1 <= len(waited) <= 4 and "another process" in waited[0]


def test_a_lock_is_free_again_when_its_owner_is_killed(tmp_path) -> None:
    code = """
import sys, time; from pathlib import Path; from qexp.system.files import file_lock
with file_lock(Path(sys.argv[1])): print("locked", flush=True); time.sleep(60)
"""
    owner = start(code, tmp_path / ".lock")
    assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
    waits = []
    threading.Timer(0.1, owner.kill).start()
    with file_lock(tmp_path / ".lock", lambda: waits.append(1)):
        owner.communicate()
    assert waits == [1]


def test_an_unwritable_folder_is_a_disk_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"), RunFolder(tmp_path / "file" / "run").locked(print):
        pass
    with pytest.raises(DiskError, match=r"paths\.outputs"):
        files.write_text(tmp_path / "file" / "x.json", "")


def test_a_file_that_a_library_makes_private_gets_the_permissions_of_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as beside:
            beside.unlink()
            beside.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
