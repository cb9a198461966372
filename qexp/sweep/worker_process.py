"""Run a worker in a process of its own and say how it ended.

It is forked from a server that has imported the libraries (`fork_client.py`), or spawned where that is not safe. The
worker leads its own session, so that Ctrl-C reaches only the parent and everything a worker started can be killed with
it; should the parent be killed, the kernel kills the worker. Everything that it prints goes to worker.log. What qexp
says (system/screen.py) comes over a pipe of its own too, and is shown as it comes (`worker_console.py`).
"""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cache, partial
from operator import eq
from pathlib import Path

from qexp.config.schema import IsolationConfig
from qexp.results.outcome import Outcome, outcome_of, outcome_of_exit, timed_out
from qexp.results.run_folder import RunFolder, Status, now_iso
from qexp.sweep.changed_files import find_changed_file
from qexp.sweep.fork_client import SERVER, ForkedWorker, ServerDied
from qexp.sweep.worker import Work, do_work
from qexp.sweep.worker_console import WorkerConsole
from qexp.system.child_process import CHUNK, MARK, ChildProcess, ends_within, kill_family, kill_marked, read_streams
from qexp.system.oom_kills import count_oom_kills
from qexp.system.openmp import openmp_variables
from qexp.system.screen import copy_of, followed_by, library_output_in


def run_worker(
    work: Work, isolation: IsolationConfig, modules: Sequence[str] = (), console: WorkerConsole | None = None
) -> Status:
    """Start a worker, follow it to its end, and return its status, which is on disk as well.

    modules: what it imports, which the fork server has then imported before. console: shows what it says. A worker
    that dies with the server is run again.
    Raises: KeyboardInterrupt, once the worker is killed and its folder marked; DiskError if that cannot be written.
    """
    timeout_minutes = isolation.timeout_minutes
    started, clock, oom_kills = now_iso(), time.monotonic(), count_oom_kills()
    process, screen = _start_with_screen(work, isolation.start, modules)
    try:
        in_time = _follow(process, screen, work.folder / "worker.log", timeout_minutes, console or WorkerConsole())
    except BaseException as error:
        kill_family(process)
        _settle(work, process, outcome_of(error), started, clock)
        raise
    lost_server = isinstance(process, ForkedWorker) and process.server_died and in_time
    if lost_server or process.wait() < 0:  # the kernel, or somebody, has killed the worker alone
        kill_marked(partial(eq, str(work.folder.absolute())))
    if lost_server:
        SERVER.note_death()
        _say_once("the process that forks workers has died; what it was running is run again")
        return run_worker(work, isolation, modules, console)
    ending = outcome_of_exit(process.wait(), _added(oom_kills, count_oom_kills()))
    outcome = ending if in_time else timed_out(timeout_minutes or 0.0)
    if in_time and process.wait() == -signal.SIGBUS:
        outcome = replace(outcome, message=f"{outcome.message}; {find_changed_file(work.folder)}")
    outcome = replace(outcome, message=f"{outcome.message}; its output is in {work.folder / 'worker.log'}")
    return _settle(work, process, outcome, started, clock)


def _added(before: int | None, after: int | None) -> int | None:
    return after - before if before is not None and after is not None else None


def run_inline(work: Work, console: WorkerConsole) -> Status:
    """Do a worker's work in this process, with what libraries print in its worker.log."""
    console.stream = copy_of(sys.stdout)  # which becomes a log
    try:
        log = (work.folder / "worker.log").open("ab", buffering=0)
    except OSError:  # a disk that takes nothing is reported where the work writes its status
        return do_work(work)
    with log, library_output_in(log, console), followed_by(console.show_record):
        return do_work(work)


def _start_with_screen(work: Work, start: str, modules: Sequence[str]) -> tuple[ChildProcess, int]:
    """(the worker, the reading end of the pipe that is its screen)."""
    screen, shown = os.pipe()
    try:
        process = _start_process(work, start, modules, shown)
    except BaseException:
        os.close(screen)
        raise
    finally:
        os.close(shown)  # or the reading end would never see that the worker is gone
    os.set_blocking(screen, False)  # it is read together with the output, whichever has something
    return process, screen


def _start_process(work: Work, start: str, modules: Sequence[str], screen: int) -> ChildProcess:
    """Start a worker as `start` says, or by spawn where forking is not possible."""
    environment = _worker_environment() | {MARK: str(work.folder.absolute())}
    if start == "fork" and SERVER.is_usable:
        try:
            worker = SERVER.fork(modules, [*work.arguments(), "--start", "fork"], environment, screen)
        except ServerDied:
            return _start_process(work, start, modules, screen)  # ends: after MAX_DEATHS the server is not usable
        if isinstance(worker, ForkedWorker):
            return worker
        _say_once(f"isolation.start=fork: {worker}; such experiments start with a fresh Python")
    command = [sys.executable, "-m", "qexp.sweep.worker", *work.arguments()]
    return subprocess.Popen(
        [*command, "--parent", str(os.getpid()), "--screen", str(screen)],
        env=environment,
        pass_fds=(screen,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the parent, which ends the whole session of the worker
    )


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _worker_environment() -> dict[str, str]:
    # W&B's variables may name a run of the calling program, which no worker must join
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": ":backslashreplace"}  # a locale may lack a letter
    environment |= openmp_variables(environment)
    # sets of texts are walked in the same order in every run
    return environment | {"PYTHONHASHSEED": environment.get("PYTHONHASHSEED", "0")}


def _follow(
    process: ChildProcess, screen: int, log_path: Path, timeout_minutes: float | None, console: WorkerConsole
) -> bool:
    """Pass output on until the worker ends; False if it had to be killed for taking too long."""
    deadline = time.monotonic() + 60 * timeout_minutes if timeout_minutes is not None else float("inf")
    output = process.stdout
    assert output is not None
    log, decoder = _Log(log_path), codecs.getincrementaldecoder("utf-8")("replace")
    with output, open(screen, "rb", buffering=0) as said, closing(console):
        for stream, data in read_streams(process, (output, said), lambda: deadline - time.monotonic()):
            if stream is output:
                log.write(data)
            else:
                console.write(decoder.decode(data))
        in_time = ends_within(process, deadline - time.monotonic())
        if not in_time:
            kill_family(process)
        while data := said.read(CHUNK):  # what came last; None where the worker's own children keep it open
            console.write(decoder.decode(data))
    return in_time


def _settle(work: Work, process: ChildProcess, otherwise: Outcome, started: str, clock: float) -> Status:
    """Return the status that the worker wrote; `otherwise` is written for one that ended without."""
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


class _Log:
    """Writes bytes to the log file; one that cannot be written costs the log, not the experiment."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.write(b"")  # the file is there even if nothing is printed

    def write(self, data: bytes) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(data)
        except OSError as error:
            print(f"warning: {self.path} is incomplete: {error.strerror}", file=sys.stderr)
            self.path = None
