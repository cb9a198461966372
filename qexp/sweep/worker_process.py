"""Run a worker in a process of its own and say how it ended.

It is forked from a server that has imported the libraries (`fork_client.py`), or spawned where that is not safe.
The worker leads its own session, so that Ctrl-C reaches only the parent and everything a worker started can be killed
with it; should the parent be killed, the kernel kills the worker. What it prints goes to worker.log and, as it comes,
to the console: bytes are passed on unchanged, so progress bars work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import IO

from qexp.config.schema import IsolationConfig
from qexp.results.outcome import Outcome, outcome_of, outcome_of_exit, timed_out
from qexp.results.run_folder import RunFolder, Status, now_iso
from qexp.sweep.fork_client import SERVER, ForkedWorker, ServerDied
from qexp.sweep.worker import Work
from qexp.system.child_process import ChildProcess, ends_within, kill_session, read_output


def run_worker(work: Work, isolation: IsolationConfig, modules: Sequence[str] = ()) -> Status:
    """Start a worker, follow it to its end, and return its status, which is on disk as well.

    modules: what it imports, which the fork server has then imported before. A worker that dies with the server is
    run again.
    Raises: KeyboardInterrupt, once the worker is killed and its folder marked; DiskError if that cannot be written.
    """
    timeout_minutes = isolation.timeout_minutes
    started, clock = now_iso(), time.monotonic()
    process = _start(work, isolation.start, modules)
    try:
        in_time = _follow(process, work.folder / "worker.log", timeout_minutes)
    except BaseException as error:
        kill_session(process)
        _settle(work, process, outcome_of(error), started, clock)
        raise
    if isinstance(process, ForkedWorker) and process.server_died and in_time:
        SERVER.note_death()
        _say_once("the process that forks workers has died; what it was running is run again")
        return run_worker(work, isolation, modules)
    outcome = outcome_of_exit(process.wait()) if in_time else timed_out(timeout_minutes or 0.0)
    outcome = replace(outcome, message=f"{outcome.message}; its output is in {work.folder / 'worker.log'}")
    return _settle(work, process, outcome, started, clock)


def _start(work: Work, start: str, modules: Sequence[str]) -> ChildProcess:
    """Start a worker as `start` says, or by spawn where forking is not possible."""
    environment = _environment()
    if start == "fork" and SERVER.is_usable:
        try:
            worker = SERVER.fork(modules, [*work.arguments(), "--start", "fork"], environment)
        except ServerDied:
            return _start(work, start, modules)
        if isinstance(worker, ForkedWorker):
            return worker
        _say_once(f"isolation.start=fork: {worker}; such experiments start with a fresh Python")
    return subprocess.Popen(
        [sys.executable, "-m", "qexp.sweep.worker", *work.arguments(), "--parent", str(os.getpid())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": ":backslashreplace"}  # a locale may lack a letter
    return environment | {"PYTHONHASHSEED": environment.get("PYTHONHASHSEED", "0")}


def _follow(process: ChildProcess, log_path: Path, timeout_minutes: float | None) -> bool:
    """Pass output on until the worker ends; False if it had to be killed for taking too long."""
    deadline = time.monotonic() + 60 * timeout_minutes if timeout_minutes is not None else float("inf")
    with _Tee(log_path) as tee:
        for data in read_output(process, lambda: deadline - time.monotonic()):
            tee.write(data)
        in_time = ends_within(process, deadline - time.monotonic())
        if not in_time:
            kill_session(process)
    return in_time


def _settle(work: Work, process: ChildProcess, otherwise: Outcome, started: str, clock: float) -> Status:
    """The status that the worker wrote; `otherwise` is written for one that ended without."""
    folder = RunFolder(work.folder)
    folder.remove_scratch()
    status = folder.read_status()
    # `running` of a process that is gone reads as failed, without the time at which it finished
    if status is not None and status.pid == process.pid and status.finished is not None:
        return status
    seconds = round(time.monotonic() - clock, 3)
    status = Status(**asdict(otherwise), pid=process.pid, started=started, finished=now_iso(), seconds=seconds)
    folder.write_status(status)
    return status


class _Tee:
    """Writes bytes to the log file and to the console."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log: IO[bytes] | None = None
        self.ended_line = True

    def __enter__(self) -> _Tee:
        self._try(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended_line:
            _to_console(b"\n")
        if self.log is not None:
            self._try(self.log.close)

    def write(self, data: bytes) -> None:
        _to_console(data)
        self.ended_line = data.endswith(b"\n")
        if self.log is not None:
            log = self.log
            self._try(lambda: log.write(data))

    def _open(self) -> None:
        self.log = self.path.open("ab", buffering=0)

    def _try(self, action: Callable[[], object]) -> None:
        """A log that cannot be written costs the log, not the experiment."""
        try:
            action()
        except OSError as error:
            self.log = None
            print(f"warning: {self.path} is incomplete: {error.strerror}", file=sys.stderr)


def _to_console(data: bytes) -> None:
    """Unchanged bytes where standard output takes them, else text (notebooks, test runners)."""
    raw = getattr(sys.stdout, "buffer", None)
    sys.stdout.flush()
    if raw is None:
        sys.stdout.write(data.decode(errors="replace"))
    else:
        raw.write(data)
    sys.stdout.flush()
