"""How an experiment ended, in the words of status.json: from an exception, or from the way its process ended.

Reasons: config, load, unsupported (the machine), oom, timeout, signal, exit, disk, hub, error (everything else).
"""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass

from qexp.errors import QexpError, UnsupportedError
from qexp.system.signals import Terminated

REASONS = ("config", "load", "oom", "timeout", "signal", "exit", "disk", "hub", "unsupported", "error")
# full, over quota, read-only, forbidden
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# Libraries that write files from native code report these as errors of their own
DISK_WORDS = ("No space left on device", "Read-only file system", "Disk quota exceeded")
MEMORY_WORDS = ("can't allocate memory", "out of memory")
SMALLER = "use a smaller backend, offload=leaf, or a smaller task"


@dataclass(frozen=True)
class Outcome:
    """status: done, failed or unsupported; reason: one of REASONS, None when done; message: one line."""

    status: str
    reason: str | None = None
    message: str = ""


DONE = Outcome("done")
KEYBOARD = "interrupted from the keyboard (Ctrl-C)"


def outcome_of(error: BaseException) -> Outcome:
    """Return status, reason and a message of one line for an exception of an experiment."""
    text = " ".join(str(error).split())
    if isinstance(error, UnsupportedError):
        return Outcome("unsupported", "unsupported", text)
    if isinstance(error, QexpError):
        return Outcome("failed", error.reason, text)
    if isinstance(error, KeyboardInterrupt):
        by = f"stopped by {signal.Signals(error.number).name}" if isinstance(error, Terminated) else KEYBOARD
        return Outcome("failed", "signal", f"{by}; run it again to go on")
    if isinstance(error, SystemExit):
        return Outcome("failed", "exit", f"the experiment called sys.exit({error.code!r})")
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if _is_out_of_memory(error, text):
        return Outcome("failed", "oom", f"out of memory ({_cut_text(named)}); {SMALLER}")
    if _is_disk(error, text):
        return Outcome("failed", "disk", f"{_cut_text(named)}; free space or make it writable, or set paths.outputs=")
    return Outcome("failed", "error", _cut_text(named))


def outcome_of_exit(code: int, oom_kills: int | None = None) -> Outcome:
    """Return the outcome of a process that ended without a status; `code` as in `subprocess`, negative for a signal.

    oom_kills: processes that the kernel killed for memory meanwhile; None if nothing counts them.
    """
    if code >= 0:
        return Outcome("failed", "exit", f"the experiment's process exited with code {code} before it had a result")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        if oom_kills:
            return Outcome("failed", "oom", f"killed by the kernel's out-of-memory killer; {SMALLER}")
        hint = f"if nobody did that, the kernel's out-of-memory killer did (see dmesg): {SMALLER}"
        if oom_kills == 0:
            hint = "not by the kernel's out-of-memory killer, which has killed nothing meanwhile"
        return Outcome("failed", "signal", f"the experiment's process was killed by SIGKILL; {hint}")
    if -code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return Outcome("failed", "signal", f"the experiment's process crashed with {name} in native code")
    return Outcome("failed", "signal", f"the experiment's process was killed by {name}")


def timed_out(minutes: float) -> Outcome:
    message = (
        f"stopped after isolation.timeout_minutes={minutes:g}; raise it (null is no limit), or make the task smaller"
    )
    return Outcome("failed", "timeout", message)


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    # torch's class is matched by name: this module is also used where torch is not imported
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in text for words in MEMORY_WORDS)


def _is_disk(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return True
    return any(words in text for words in DISK_WORDS)


def _cut_text(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
