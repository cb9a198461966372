"""Runs probes, each in a process of its own: one that crashes or hangs is the result of the option it was at.

The options behind it are tried in a new process. A process has `timeout` seconds for each option, its imports
included in the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from qexp.results.outcome import outcome_of_exit
from qexp.system.child_process import ends_within, kill_family, read_output

PROBE = [sys.executable, "-m", "qexp.doctor.probe"]


def probe(trials: Sequence[dict[str, Any]], device: str, timeout: float) -> Iterator[dict[str, Any]]:
    """Yield the results of the trials, in order: {"option", "status", "reason", "message", "measured", "seconds"}."""
    left = list(trials)
    while left:
        for result in _run(tuple(left), device, timeout):
            yield {"option": left.pop(0)["option"], **result}


def _run(trials: Sequence[dict[str, Any]], device: str, timeout: float) -> Iterator[dict[str, Any]]:
    """Yield the results from one process, in order, at least one; the last is its end if that came too early."""
    given = 0
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as errors:
        stdin.write(json.dumps({"device": device, "trials": list(trials)}).encode())
        stdin.seek(0)
        started = time.monotonic()
        process = subprocess.Popen(PROBE, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            for line in _lines(process, timeout):
                answer = json.loads(line)
                if "end" in answer:
                    assert answer.pop("end") == trials[given]["option"]
                    yield answer
                    given, started = given + 1, time.monotonic()
            if given < len(trials):
                yield _ended(process, errors, timeout, time.monotonic() - started)
        finally:
            kill_family(process)


def _lines(process: subprocess.Popen[bytes], timeout: float) -> Iterator[bytes]:
    """Yield the lines that a process writes, until it ends or no line of a result came for `timeout` seconds."""
    rest, deadline = b"", time.monotonic() + timeout

    def time_left() -> float:
        return deadline - time.monotonic()

    for data in read_output(process, time_left):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if b'"end"' in line:
                deadline = time.monotonic() + timeout
            yield line
    ends_within(process, 1)  # its output is closed: it is about to end


def _ended(process: subprocess.Popen[bytes], errors: IO[bytes], timeout: float, seconds: float) -> dict[str, Any]:
    """Return the result of the option that a process was at when it ended, or when its time was over."""
    code = process.poll()
    if code is None:
        reason, message = "timeout", f"it did not answer within {timeout:g} s, and was stopped (--timeout raises that)"
    else:
        outcome = outcome_of_exit(code)
        last = _last_line(errors) if code > 0 else ""
        reason, message = str(outcome.reason), f"{outcome.message}: {last}" if last else outcome.message
        message = message.replace("the experiment's process", "its process")
    return {"status": "fails", "reason": reason, "message": message, "measured": {}, "seconds": round(seconds, 2)}


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
