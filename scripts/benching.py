"""What the benchmarks share: fresh processes watched from outside, the machine's own limits, results as JSON.

A measured program is a process that speaks three lines: it prints "ready" when it has imported and warmed up, waits for
a line, does its work, and prints a JSON object. Memory is sampled between the last two, and peaks are also reported for
phases of the work, which print their names when they end.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
MIB = 1 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # of this process and its children: users' modules are compiled once
RESULTS = Path(__file__).parents[1] / "docs" / "bench"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "torchao", "optimum-quanto", "gguf")


def bench_parser(description: str | None, result: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, with --out: the file of its result, by default docs/bench/<result>."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / result)
    return parser


def resident_bytes(pid: int | str = "self") -> dict[str, int]:
    """Anonymous, file and all resident bytes of a process."""
    _, resident, shared, *_ = (
        int(field) * PAGE_BYTES for field in Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()
    )
    return {"anon": resident - shared, "file": shared, "total": resident}


class Sampler(threading.Thread):
    """Peak anonymous, file and total resident bytes of another process, sampled every millisecond."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.done = threading.Event()
        self.baseline = self.peak = resident_bytes(pid)

    def run(self) -> None:
        while not self.done.is_set():
            now = resident_bytes(self.pid)
            self.peak = {kind: max(self.peak[kind], now[kind]) for kind in now}
            time.sleep(0.001)

    def so_far(self) -> dict[str, int]:
        """`peak_<kind>_bytes`: what the work has added to the process."""
        return {f"peak_{kind}_bytes": self.peak[kind] - self.baseline[kind] for kind in self.peak}

    def over_baseline(self) -> dict[str, int]:
        """The same of all the work, which has ended."""
        self.done.set()
        self.join()
        return self.so_far()


def run_watched(command: Sequence[str], **variables: str) -> dict[str, Any]:
    """Return what the program printed, and its peaks. variables: of its environment. Exits if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as messages:  # what libraries say while they are imported
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            encoding="utf-8",
            env={**os.environ, **variables},
        )
        assert process.stdin is not None and process.stdout is not None
        line, peaks = "", dict[str, int]()
        if process.stdout.readline().strip() == "ready":
            sampler = Sampler(process.pid)
            sampler.start()
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            while line and not line.startswith("{"):
                peaks |= {f"{line.strip()}_{name}": value for name, value in sampler.so_far().items()}
                line = process.stdout.readline()
            peaks |= sampler.over_baseline()
        process.communicate("\n")
        if not line:
            messages.seek(0)
            raise SystemExit(f"{messages.read()}\n{' '.join(command)} failed")
    return {**json.loads(line), **peaks}


def timed(command: Sequence[str], log: Path, watch: Callable[[int], None] = lambda pid: None) -> dict[str, float]:
    """Return wall seconds, CPU seconds of all processes, and the load average before a command that must succeed."""
    load, before, began = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            watch(process.pid)
            time.sleep(0.05)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{log.read_text(encoding='utf-8')}\n{' '.join(command)} failed")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": wall, "cpu_seconds": cpu, "load_average_before": load}


class Stopwatch:
    """Wall and CPU seconds, and page faults, of a block in this process, all threads included."""

    def __enter__(self) -> Stopwatch:
        self.started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.taken = [after - before for before, after in zip(self.started, self._now(), strict=True)]

    @staticmethod
    def _now() -> tuple[float, float, int]:
        return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def result(self) -> dict[str, float]:
        return dict(zip(("wall_seconds", "cpu_seconds", "minor_faults"), self.taken, strict=True))


def serve(result: dict[str, Any]) -> None:
    """The measured program's last line; it stays until its memory has been sampled."""
    print(json.dumps(result), flush=True)
    sys.stdin.readline()


def phase(name: str) -> None:
    """A part of the measured work has ended: its peaks are reported as `<name>_peak_<kind>_bytes`."""
    print(name, flush=True)


def wait_for_start() -> None:
    """The measured program is ready; go on when the watcher says so."""
    print("ready", flush=True)
    sys.stdin.readline()


def alternating(programs: Sequence[Item], repeats: int) -> Iterator[Item]:
    """Yield every program `repeats` times, in alternating order: a machine that slows down slows all of them."""
    for repeat in range(repeats):
        yield from programs if repeat % 2 == 0 else reversed(programs)


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over runs of the same program; what is no number is taken from the first."""
    first = runs[0]
    numbers = [name for name, value in first.items() if isinstance(value, int | float) and name in runs[-1]]
    return {**first, **{name: statistics.median(run[name] for run in runs) for name in numbers}}


def drop_from_cache(files: Iterable[Path]) -> None:
    """Write what is dirty and forget the cached pages, so that the next read comes from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_seconds(files: Iterable[Path]) -> float:
    """Time to read files from beginning to end into a buffer that is used again."""
    with mmap.mmap(-1, 32 * MIB) as buffer:  # begins with a page: Linux copies to some other addresses far slower
        buffer[:] = bytes(len(buffer))
        started = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        return time.perf_counter() - started


def direct_read_seconds(files: Iterable[Path]) -> float:
    """Time to read files past the page cache, where the file system can: from the disk, whatever is cached."""
    with mmap.mmap(-1, 32 * MIB) as buffer:
        started = time.perf_counter()
        for file in files:
            descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                offset = 0
                while got := os.preadv(descriptor, [buffer], offset):
                    offset += got
                    if got % PAGE_BYTES:
                        break
            finally:
                os.close(descriptor)
        return time.perf_counter() - started


def copy_bytes_per_second() -> float:
    """Measured bandwidth of copying 256 MiB in memory on all cores: bytes read + bytes written."""
    import torch

    source = torch.ones(256 * MIB, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(5))


def fresh_bytes_per_second() -> float:
    """Measured bandwidth of writing memory that the process has just got, on all cores: the system clears it first."""
    import torch

    nbytes = 256 * MIB  # far above what the allocator keeps
    return nbytes / min(_seconds(lambda: torch.empty(nbytes, dtype=torch.uint8).fill_(1)) for _ in range(5))


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    from qexp.results import environment

    return {
        "cpu": environment.cpu_name(),
        "instruction_sets": instruction_sets(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        "python": platform.python_version(),
        "versions": {name: found for name, found in environment.versions_of(PACKAGES).items() if found is not None},
        "load_average_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def instruction_sets() -> list[str]:
    """Return those of the processor that PyTorch and the compiled loops choose between."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c", "sse4")))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    from qexp.system.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"wrote {path}", file=sys.stderr)
