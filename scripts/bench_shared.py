"""A step of a model beside another program that keeps a core busy: `python -m qexp`, quiet and not.

    python scripts/bench_shared.py            # four minutes
    python scripts/bench_shared.py --quick    # fewer steps, once each

The digits model, unquantized and in nf4, in a fresh process for each measurement, in alternating order: alone on the
machine, beside one program that counts for ever, and beside one for each core. `asleep` is the default, in which
OpenMP's threads sleep between loops; `spinning` is OMP_WAIT_POLICY=active, and `library` is libgomp's own, set by
GOMP_SPINCOUNT. Medians of the median step (time/step_ms).

Writes docs/bench/shared.json. Exits with 1 if a step beside one busy program takes more than 3 times its quiet time, or
if a quiet machine loses more than 2 % to the library's own waiting. A busy machine decides that, too: see the load
average beside each row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benching import machine, write_result

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "shared.json"
COUNT = "while True: pass"
WAITING = {
    "asleep": {},
    "library": {"GOMP_SPINCOUNT": "300000"},  # what libgomp has without a setting
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
}
BACKENDS = ("none", "bitsandbytes")
MOST_SLOWER, MOST_LOST = 3.0, 0.02
TIMEOUT_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="options of conf/backend")
    parser.add_argument("--waiting", nargs="+", default=list(WAITING), choices=WAITING)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 steps of 16 images, once each; targets are not checked")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.images, arguments.repeats = 8, 16, 1
    about = machine()
    rows = list(measure(arguments))
    write_result(arguments.out, {"machine": about, "rows": rows})
    missed = [] if arguments.quick else misses(rows)
    print("\n".join(missed))
    return 1 if missed else 0


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every (backend, waiting, busy programs)."""
    counts = sorted({0, 1, len(os.sched_getaffinity(0))})
    cases = [(backend, name, busy) for backend in arguments.backends for name in arguments.waiting for busy in counts]
    times: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for repeat in range(arguments.repeats):
        for case in cases if repeat % 2 == 0 else reversed(cases):
            backend, name, busy = case
            with busy_programs(busy):
                times[case].append(step_times(backend, WAITING[name], arguments.steps, arguments.images))
            print(f"{backend}, {name}, {busy} busy: {times[case][-1]['step_ms']:.1f} ms", file=sys.stderr, flush=True)
    for (backend, name, busy), found in times.items():
        medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
        quiet = statistics.median(run["step_ms"] for run in times[backend, name, 0])
        row = {"backend": backend, "waiting": name, "busy_programs": busy, **medians}
        yield {**row, "times_quiet": medians["step_ms"] / quiet}


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run programs that keep a core each busy."""
    programs = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def step_times(backend: str, variables: dict[str, str], steps: int, images: int) -> dict[str, float]:
    """Return the median and the slowest step of one experiment, and the load average before it."""
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"task.num_inference_steps={steps}", f"task.num_images={images}", f"paths.outputs={folder}"]
        command = [sys.executable, "-m", "qexp", f"backend={backend}", *settings, "tracking=none"]
        run_quietly(command, environment)
        (result,) = Path(folder, "runs").glob("*/result.json")
        metrics = json.loads(result.read_text(encoding="utf-8"))["metrics"]
    return {
        "step_ms": metrics["time/step_ms"],
        "slowest_step_ms": metrics["time/step_ms_max"],
        "load_average_before": load,
    }


def run_quietly(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{' '.join(command)} failed")


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the targets that were missed, of what was measured."""
    by_case = {(row["backend"], row["waiting"], row["busy_programs"]): row for row in rows}
    missed = []
    for (backend, name, busy), row in by_case.items():
        if name != "asleep":
            continue
        if busy == 1 and row["times_quiet"] > MOST_SLOWER:
            missed.append(
                f"{backend}: a step beside a busy program takes {row['times_quiet']:.1f} times its quiet time"
            )
        library = by_case.get((backend, "library", busy))
        if busy == 0 and library is not None and row["step_ms"] > (1 + MOST_LOST) * library["step_ms"]:
            missed.append(f"{backend}: {row['step_ms']:.1f} ms a step asleep, {library['step_ms']:.1f} spinning")
    return missed


if __name__ == "__main__":
    sys.exit(main())
