import signal

import pytest

from qexp.errors import ConfigError, DiskError, LoadError, MissingLibraryError, UnsupportedError
from qexp.results.outcome import REASONS, outcome_of, outcome_of_exit, timed_out


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (ConfigError("x"), "failed", "config"),
        (MissingLibraryError("x"), "failed", "config"),
        (LoadError("x"), "failed", "load"),
        (DiskError("x"), "failed", "disk"),
        (UnsupportedError("x"), "unsupported", "unsupported"),
        (MemoryError(), "failed", "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "failed", "oom"),
        (RuntimeError("CUDA error: out of memory"), "failed", "oom"),
        (OSError(28, "No space left on device"), "failed", "disk"),
        (OSError(122, "Disk quota exceeded"), "failed", "disk"),
        (OSError(30, "Read-only file system"), "failed", "disk"),
        (PermissionError(13, "Permission denied"), "failed", "disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "failed", "disk"),
        (FileNotFoundError(2, "No such file"), "failed", "error"),
        (SystemExit(3), "failed", "exit"),
        (KeyboardInterrupt(), "failed", "signal"),
        (ZeroDivisionError("division by zero"), "failed", "error"),
        (ValueError("the words out of memory in somebody's text"), "failed", "error"),
    ],
)
def test_every_error_has_a_reason(error, status, reason) -> None:
    outcome = outcome_of(error)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert reason in REASONS


def test_torch_s_own_error_is_out_of_memory() -> None:
    import torch

    assert outcome_of(torch.OutOfMemoryError("Tried to allocate 20 GiB")).reason == "oom"


def test_a_message_is_one_line_that_users_can_read() -> None:
    assert outcome_of(ConfigError("value\n  rule")).message == "value rule"
    assert outcome_of(KeyError("x")).message == "KeyError: 'x'"
    assert outcome_of(RuntimeError()).message == "RuntimeError"
    assert len(outcome_of(RuntimeError("x" * 10_000)).message) == 400
    assert "offload=" in outcome_of(MemoryError()).message


def test_processes_that_end_without_a_word() -> None:
    assert "code 4" in outcome_of_exit(4).message
    killed = outcome_of_exit(-signal.SIGKILL)
    assert killed.reason == "signal" and "SIGKILL" in killed.message and "out-of-memory killer" in killed.message
    assert outcome_of_exit(-signal.SIGKILL, oom_kills=1).reason == "oom"
    other = outcome_of_exit(-signal.SIGKILL, oom_kills=0)
    assert other.reason == "signal" and "not by the kernel" in other.message
    assert outcome_of_exit(-signal.SIGTERM, oom_kills=1).reason == "signal"
    crashed = outcome_of_exit(-signal.SIGSEGV)
    assert crashed.reason == "signal" and "crashed with SIGSEGV" in crashed.message
    assert "out-of-memory" not in outcome_of_exit(-signal.SIGTERM).message
    assert "signal 33" in outcome_of_exit(-33).message  # has no name
    assert "timeout_minutes=0.5" in timed_out(0.5).message
