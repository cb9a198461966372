"""A step of a model, quiet and beside another busy program: OpenMP's threads as workers start, and spinning.

    python scripts/bench_shared.py            # 60 measurements on two cores: about a quarter of an hour
    python scripts/bench_shared.py --quick    # fewer steps, once each

The digits model, unquantized and in nf4. Each measurement is a `python -m qexp` of its own, whose worker starts as
every worker does, and takes the median of its steps (time/step_ms). All cases take turns, in alternating order. Varied:

- threads. qexp: as workers start. spinning: as the library waits without qexp, set by GOMP_SPINCOUNT. asleep and
  active, which are measured only if asked for: OMP_WAIT_POLICY=PASSIVE and ACTIVE.
- beside. nothing; counting: a program that keeps one core busy; multiplying: one that multiplies matrices with PyTorch,
  with a thread for each core, which spin.

Reported for each case: median, least and largest of its n measurements; the median of their slowest steps; the cores
that others kept busy meanwhile (time/other_cores), which says of the quiet rows how quiet the machine was; and how many
times its quiet time a step takes.

Writes docs/bench/shared.json. Exits with 1 if a step beside one busy program takes more than 3 times its quiet time
as workers start, or if a quiet machine loses 2 % to it. On a machine that others use, that may be their doing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benching import alternating, bench_parser, machine, write_result

from qexp.system.openmp import DECIDED_BY

BACKENDS = ("none", "bitsandbytes")
THREADS = {
    "qexp": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own without a setting
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}
ENDS_WITH_PARENT = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
"""
BUSY_PROGRAMS = {
    "counting": "print('busy', flush=True)\nwhile True: pass",
    "multiplying": "import torch\na = torch.ones(512, 512)\na @ a\nprint('busy', flush=True)\nwhile True: a @ a",
}
QUIET = "nothing"
MOST_SLOWER, MOST_LOST = 3.0, 0.02
TIMEOUT_SECONDS = 600
COLUMNS = ["backend", "threads", "beside", "step ms (range)", "n", "slowest ms", "cores of others", "times quiet"]
Case = tuple[str, str, str]  # backend, threads, beside


def main() -> int:
    parser = bench_parser(__doc__, "shared.json")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="options of conf/backend")
    parser.add_argument("--threads", nargs="+", default=["qexp", "spinning"], type=kind_of_threads)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 steps of 16 images, once each; targets are not checked")
    parser.add_argument("--folder", help="where to keep outputs meanwhile; default: the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.images, arguments.repeats = 8, 16, 1
    settings = [f"task.num_inference_steps={arguments.steps}", f"task.num_images={arguments.images}"]
    about = machine()
    rows = measure(arguments.backends, arguments.threads, arguments.repeats, settings, arguments.folder)
    write_result(arguments.out, {"machine": about, "settings": settings, "rows": rows})
    print(describe(rows))
    missed = [] if arguments.quick else misses(rows)
    print("\n".join(missed))
    return 1 if missed else 0


def measure(
    backends: Sequence[str], threads: Sequence[str], repeats: int, settings: Sequence[str], folder: str | None
) -> list[dict[str, Any]]:
    """Return a row for every case. folder: where outputs are kept meanwhile."""
    cases = [(backend, kind, beside) for backend in backends for kind in threads for beside in (QUIET, *BUSY_PROGRAMS)]
    runs: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(dir=folder) as root:
        run_steps(Path(root), "none", {}, settings)  # computes the reference
        for case in alternating(cases, repeats):
            backend, kind, beside = case
            with busy_program(beside):
                runs[case].append(run_steps(Path(root), backend, variables_of(kind), settings))
            print(f"{', '.join(case)}: {runs[case][-1]['time/step_ms']:.1f} ms", file=sys.stderr, flush=True)
    quiet = {(backend, kind): step_ms(runs[backend, kind, QUIET]) for backend, kind, _ in cases}
    return [{**row_of(case, runs[case]), "times_quiet": step_ms(runs[case]) / quiet[case[:2]]} for case in cases]


def kind_of_threads(text: str) -> str:
    """Return a value of --threads. Raises ArgumentTypeError for one that is neither a kind nor a number of turns."""
    if text in THREADS or text.isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text}: use {', '.join(THREADS)}, or how often a waiting thread turns: 30000")


def variables_of(kind: str) -> dict[str, str]:
    """Return the environment variables of a value of --threads."""
    return THREADS.get(kind, {"GOMP_SPINCOUNT": kind})


@contextmanager
def busy_program(name: str) -> Iterator[None]:
    """Run a program of BUSY_PROGRAMS meanwhile, or nothing. It ends also if this process is killed."""
    if name == QUIET:
        yield
        return
    command = [sys.executable, "-c", ENDS_WITH_PARENT + BUSY_PROGRAMS[name]]
    environment = environment_without_threads({})
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        try:
            if program.stdout.readline() != b"busy\n":
                raise SystemExit(f"the program beside, {name!r}, ended before it began")
            yield
        finally:
            program.kill()


def environment_without_threads(variables: dict[str, str]) -> dict[str, str]:
    """Return this process's environment without settings of threads, and with `variables`."""
    unset = (*DECIDED_BY, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in unset} | variables


def run_steps(root: Path, backend: str, variables: dict[str, str], settings: Sequence[str]) -> dict[str, float]:
    """Run one experiment by itself; returns its metrics. Raises SystemExit if it fails."""
    command = [sys.executable, "-m", "qexp", f"backend={backend}", *settings, f"paths.outputs={root}", "tracking=none"]
    environment = environment_without_threads(variables)
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{' '.join(command)} failed")
    (result,) = root.glob("runs/*/result.json")
    metrics: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["metrics"]
    shutil.rmtree(root / "runs")  # or the next one of the kind would be reused
    return metrics


def step_ms(runs: Sequence[dict[str, float]]) -> float:
    return statistics.median(run["time/step_ms"] for run in runs)


def row_of(case: Case, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the median and the spread of a case's measurements."""
    steps = [run["time/step_ms"] for run in runs]
    return {
        **dict(zip(("backend", "threads", "beside"), case, strict=True)),
        "n": len(runs),
        "step_ms": step_ms(runs),
        "least_step_ms": min(steps),
        "largest_step_ms": max(steps),
        "slowest_step_ms": statistics.median(run["time/step_ms_max"] for run in runs),
        "other_cores": statistics.median(run["time/other_cores"] for run in runs),
    }


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/benchmarks.md."""
    lines = [COLUMNS, ["---"] * 3 + ["--:"] * 5, *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: dict[str, Any]) -> list[str]:
    spread = f"{row['step_ms']:.1f} ({row['least_step_ms']:.1f}, {row['largest_step_ms']:.1f})"
    numbers = f"{row['slowest_step_ms']:.0f}", f"{row['other_cores']:.2f}", f"{row['times_quiet']:.2f}"
    return [row["backend"], row["threads"], row["beside"], spread, str(row["n"]), *numbers]


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the targets that were missed, of what was measured."""
    quiet = {(row["backend"], row["threads"]): row["step_ms"] for row in rows if row["beside"] == QUIET}
    slower = [
        f"{row['backend']}: beside a program that is {row['beside']}, a step takes {row['times_quiet']:.2f} times its "
        f"quiet time, above {MOST_SLOWER}"
        for row in rows
        if row["threads"] == "qexp" and row["times_quiet"] > MOST_SLOWER
    ]
    lost = [
        f"{backend}: {own:.1f} ms a step as workers start, {quiet[backend, 'spinning']:.1f} spinning: more than "
        f"{MOST_LOST:.0%} lost"
        for (backend, kind), own in quiet.items()
        if kind == "qexp" and own >= (1 + MOST_LOST) * quiet.get((backend, "spinning"), own)
    ]
    return slower + lost


if __name__ == "__main__":
    sys.exit(main())
