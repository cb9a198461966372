"""Follow a process that leads a session of its own, and end it with everything that it started, or with its parent."""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import IO, Protocol

import psutil

POLL_SECONDS = 0.2  # how late an ended process is noticed whose own children keep its output open
CHUNK = 1 << 16
MARK = "QEXP_RUN"  # variable of a worker and of everything that it starts: the absolute path of its run folder
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class ChildProcess(Protocol):
    """What `subprocess.Popen` shows of a process; forked workers show the same."""

    pid: int

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def read_output(process: ChildProcess, time_left: Callable[[], float]) -> Iterator[bytes]:
    """Yield what a process prints, as it comes, until it ends or no time is left.

    time_left: seconds that it still has; it is asked again before each read.
    """
    output = process.stdout
    assert output is not None
    with output:
        for _, data in read_streams(process, (output,), time_left):
            yield data


def read_streams(
    process: ChildProcess, streams: Iterable[IO[bytes]], time_left: Callable[[], float]
) -> Iterator[tuple[IO[bytes], bytes]]:
    """Yield what arrives from each stream, until all of them or the process have ended, or no time is left."""
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ, stream)
        while selector.get_map() and (left := time_left()) > 0:
            ready = selector.select(min(left, POLL_SECONDS))
            if not ready and process.poll() is not None:
                return
            for key, _ in ready:
                if data := os.read(key.fd, CHUNK):
                    yield key.data, data
                else:
                    selector.unregister(key.fileobj)


def ends_within(process: ChildProcess, seconds: float) -> bool:
    """Wait for a process that may have closed its output but still runs."""
    try:
        process.wait(None if seconds == float("inf") else max(seconds, 0))
    except subprocess.TimeoutExpired:
        return False
    return True


def adopt_orphans() -> None:
    """Be the parent of all descendants whose own parent ends, so that `kill_family` finds them all."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_family(process: ChildProcess) -> None:
    """Kill a process, if it has not ended, and everything that it started, in sessions of their own too."""
    _kill_all(lambda: _family_of(process))
    with suppress(ProcessLookupError):  # what the process has left, if it has ended: they are not its children any more
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family_of(process: ChildProcess) -> list[psutil.Process]:
    if process.poll() is not None:
        return []  # its number may be another's
    try:
        leader = psutil.Process(process.pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return []


def _kill_all(find: Callable[[], list[psutil.Process]]) -> None:
    """Kill the processes that `find` finds, and what they start meanwhile."""
    stopped: dict[int, psutil.Process] = {}
    while new := [one for one in find() if one.pid not in stopped]:  # a stopped one starts no other
        for one in new:
            stopped[one.pid] = one
            with suppress(psutil.Error):
                one.suspend()
    for one in stopped.values():
        with suppress(psutil.Error):
            one.kill()


def end_with_children(parent: int) -> None:
    """Kill all descendants of this process, and end it, when its parent ends or on SIGTERM.

    The kernel's signal reaches a process alone: its children would go on.
    """

    def end(number: int, frame: object) -> None:
        _kill_all(lambda: psutil.Process().children(recursive=True))
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    die_with_parent(parent, signal.SIGTERM)


def kill_marked(folders: Callable[[str], bool]) -> None:
    """Kill what workers have started that are gone. folders: whether a run folder, as in MARK, is one of theirs.

    A process whose worker was killed together with all that watched it belongs to the system, and is known only by its
    environment. This process and those above it are spared.
    """
    above = {os.getpid(), *(one.pid for one in psutil.Process().parents())}

    def find() -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if one.pid not in above and folders(_mark_of(one))]

    _kill_all(find)


def _mark_of(process: psutil.Process) -> str:
    """Return the run folder whose worker started a process; '' for none, or another user's."""
    try:
        return str(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):  # it has ended
        return ""


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent ends, so that no experiment outlives its sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
