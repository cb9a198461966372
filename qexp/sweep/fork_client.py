"""The parent's side of the fork server: start it, have it fork workers, notice its end.

A server that dies is started once more, and then workers are spawned. What it cannot do safely is said once.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import IO, Any

from qexp.system.openmp import DECIDED_BY, THREADS

MAX_DEATHS = 2  # one may be an accident, such as the kernel's choice when memory runs out
# These libraries of linear algebra start a thread for each core as they are imported. MKL starts none, and its variable
# must not be set here: torch reads it as it is imported, and its forked workers would compute with one thread.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "BLIS_NUM_THREADS": "1"}
# torch asks the driver's library for devices; without, asking would initialize CUDA
BEFORE_DEVICES = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class ServerDied(Exception):
    """The server ended while it was asked for a worker, or while one ran."""


class ForkedWorker:
    """A worker as `subprocess.Popen` shows a process: pid, stdout, poll, wait, returncode."""

    def __init__(self, connection: Connection, pid: int, stdout: IO[bytes]) -> None:
        self.connection, self.pid, self.stdout = connection, pid, stdout
        self.returncode: int | None = None
        self.server_died = False

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not self.connection.poll(timeout):
                raise subprocess.TimeoutExpired("a forked worker", timeout or 0)
            try:
                self.returncode = int(_receive(self.connection)["exit"])
            except ServerDied:  # and the kernel has killed the worker with it
                self.returncode, self.server_died = -9, True
        return self.returncode


class ForkServer:
    """A server process, started when the first worker is wanted."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.threads: list[str | None] = []
        self.deaths = 0

    @property
    def is_usable(self) -> bool:
        return sys.platform == "linux" and self.deaths < MAX_DEATHS

    def start(self, environment: Mapping[str, str]) -> Connection:
        """Start the server unless it runs, with the settings of threads that libraries read as they are imported."""
        threads = [environment.get(name) for name in (*DECIDED_BY, *THREADS)]
        is_running = self.process is not None and self.process.poll() is None
        if self.connection is not None and is_running and threads == self.threads:
            return self.connection
        self.stop()
        self.threads = threads
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as log:
            command = [sys.executable, "-m", "qexp.sweep.fork_server", "--parent", str(os.getpid())]
            self.process = subprocess.Popen(
                [*command, "--connection", str(theirs.fileno())],
                env={**environment, **ONE_THREAD, **BEFORE_DEVICES},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches only the parent
            )
        self.connection = Connection(ours.detach())
        return self.connection

    def fork(
        self, modules: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str], screen: int
    ) -> ForkedWorker | str:
        """Have a worker forked after `modules` are imported; returns it, or why it must be spawned.

        screen: a descriptor that takes what this program says; the worker's `stdout` is what libraries print as well.

        Raises: ServerDied.
        """
        connection = self.start(environment)
        reader, writer = os.pipe()
        order = {"modules": modules, "arguments": arguments, "environment": environment, "directory": os.getcwd()}
        try:
            assert self.process is not None
            connection.send_bytes(json.dumps(order).encode())
            for descriptor in (writer, screen):
                send_handle(connection, descriptor, self.process.pid)
            answer = _receive(connection)
        except (ServerDied, OSError) as error:
            os.close(reader)
            self.note_death()
            raise ServerDied from error
        finally:
            os.close(writer)
        if "pid" not in answer:
            os.close(reader)
            return str(answer.get("error") or f"the forked process ended with {answer.get('exit')} before it began")
        return ForkedWorker(connection, int(answer["pid"]), open(reader, "rb", buffering=0))

    def note_death(self) -> None:
        self.deaths += 1
        self.stop()

    def stop(self) -> None:
        """End the server, and with it what it has forked."""
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.connection = None


def _receive(connection: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(connection.recv_bytes())
    except (EOFError, OSError) as error:
        raise ServerDied from error
    return answer


SERVER = ForkServer()
atexit.register(SERVER.stop)
