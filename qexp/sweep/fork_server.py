"""Import what experiments need once, and fork a worker from there for each of them.

A fresh Python takes seconds to import torch, the quantizer's library and the scores' ones, more than a small experiment
takes. The server only imports, and starts LLVM, which reads compiled loops: no tensor operation, no device. It has one
thread, because a fork copies no other one; and a child of a process that has used CUDA cannot use it. What would break
either is an error, and the worker is then started by `spawn`.

    python -m qexp.sweep.fork_server --connection <fd> --parent <pid>

One request at a time, as JSON over a socket, followed by the descriptors that take the worker's output and its screen:
{"modules", "arguments", "environment", "directory"}. Answers: {"error"}, or {"pid"} from the worker once it stands
alone, then {"exit"} with its exit code, negative for a signal.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from qexp.sweep import worker
from qexp.sweep.preload import import_modules
from qexp.system.child_process import adopt_orphans, die_with_parent, end_with_children
from qexp.system.file_pages import map_file_pages, resident_file_pages

Pages = Iterable[tuple[int, int]]  # runs of pages: address, bytes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qexp.sweep.fork_server", description="Fork workers on request.")
    parser.add_argument("--connection", type=int, required=True, help="descriptor of the socket to the parent")
    parser.add_argument("--parent", type=int, required=True, help="end when this process does")
    arguments = parser.parse_args()
    end_with_children(arguments.parent)
    with Connection(arguments.connection) as connection, contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = json.loads(connection.recv_bytes())
            serve(connection, request, recv_handle(connection), recv_handle(connection))
    return 0


def serve(connection: Connection, request: Mapping[str, Any], output: int, screen: int) -> None:
    """Fork one worker and wait for its end, or say why not."""
    server = os.getpid()
    try:
        error = failed_import(request["modules"]) or reason_not_to_fork()
        if error is not None:
            return send(connection, error=error)
        gc.freeze()  # the collector of the child leaves what is imported alone, so that it stays shared
        pages = resident_file_pages()
        pid = os.fork()
        if pid == 0:
            become_worker(connection, request, (output, screen), server, pages)
    finally:
        os.close(output)
        os.close(screen)
    send(connection, exit=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def send(connection: Connection, **answer: Any) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def failed_import(names: Iterable[str]) -> str | None:
    """Import modules; returns what went wrong with the first that cannot be."""
    try:
        import_modules(names)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def reason_not_to_fork() -> str | None:
    """Why a copy of this process would not work, or None."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        return f"imports have started {threads - 1} threads, which a fork does not copy"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "imports have initialized CUDA, which a forked process cannot use"
    return None


def become_worker(
    connection: Connection, request: Mapping[str, Any], outputs: tuple[int, int], server: int, pages: Pages
) -> None:
    """Take on the worker's environment in the child, run it, and end the process."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        die_with_parent(server)
        adopt_orphans()
        nothing, (output, screen) = os.open(os.devnull, os.O_RDONLY), outputs
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(nothing)
        os.close(output)
        with connection:
            send(connection, pid=os.getpid())
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        random.seed()  # else every worker would draw the server's numbers where nothing is seeded
        restore_threads()
        map_file_pages(pages)
        code = worker.main([*request["arguments"], "--screen", str(screen)])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()  # multiprocessing's way: `os._exit` runs none
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def restore_threads() -> None:
    """Give numpy's and scipy's linear algebra the threads that a fresh process has."""
    names = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
    wanted = next((os.environ[name] for name in names if os.environ.get(name, "").isdecimal()), None)
    count = int(wanted) if wanted else len(os.sched_getaffinity(0))
    if count > 1 and "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=count, user_api="blas")


if __name__ == "__main__":
    sys.exit(main())
