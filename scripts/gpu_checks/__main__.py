"""The command: `scripts/gpu_check --help`. Imports no torch; all that can crash happens in the worker."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks.checks import BAD, FAILED, PASSED, Row
from gpu_checks.worker import GROUPS, LOST
from qexp.results.environment import git_commit, versions_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "torchao", "optimum-quanto", "gguf")
NO_GPU = 3  # exit status
TASK = ("device", "small", "groups", "backends", "gib", "folder", "setup")  # arguments that the worker needs
SILENT_SECONDS = 150  # a check that takes longer hangs
MOST_PROCESSES = 20  # as many as this may die on the way


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.device.startswith("cuda") and not has_cuda():
        print("gpu_check: PyTorch sees no CUDA device here; nothing was checked", file=sys.stderr)
        return NO_GPU
    result = Collector(arguments).collect()
    out = arguments.out or ROOT / "docs" / "gpu" / f"{result['date'][:10]}-{slug(result['device'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, out)
    return 0 if result["passed"] else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu_check", description="Check loading and offloading on an accelerator.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<index>, cpu, or any other device of PyTorch")
    parser.add_argument("--small", action="store_true", help="tiny models: tries the checks, measures nothing")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="what to check; default: all")
    parser.add_argument("--backends", nargs="+", default=[], help="options of conf/backend; default: all")
    parser.add_argument("--minutes", type=float, default=7.75, help="checks that would start later are skipped")
    parser.add_argument(
        "--gib", type=float, default=4.0, help="weights of the model that is timed; host memory: 4 times"
    )
    parser.add_argument("--out", type=Path, help="default: docs/gpu/<date>-<device>.json")
    parser.add_argument("--folder", help="for checkpoints and offloaded weights, 2 GiB; default: the temporary folder")
    parser.add_argument("--setup", default="", help="module:function that makes the device known to PyTorch")
    return parser.parse_args(arguments)


def has_cuda() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


class Collector:
    """Runs workers until every check has a row, and shows progress on standard error."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.speed: dict[str, Any] = {}
        self.started = time.monotonic()

    def collect(self) -> dict[str, Any]:
        for _ in range(MOST_PROCESSES):
            if self._run_worker():
                break
        else:
            self._add(Row("worker", "all checks", FAILED, f"{MOST_PROCESSES} processes died on the way"))
        if not self.rows:
            self._add(Row("worker", "all checks", FAILED, "nothing was checked"))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return {
            "schema": 1,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "passed": not any(row["status"] in BAD for row in self.rows),
            "counts": Counter(row["status"] for row in self.rows),
            "seconds": round(time.monotonic() - self.started, 1),
            "small": self.arguments.small,
            "groups": self.arguments.groups,
            "backends": self.arguments.backends or "all",
            "device": self.facts,
            "host": {
                "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "machine": platform.machine(),
            },
            "versions": {"python": platform.python_version()}
            | {name: found or "missing" for name, found in versions_of(PACKAGES).items()},
            "git": git_state(),
            "speed": self.speed,
            "rows": self.rows,
        }  # fmt: skip

    def _run_worker(self) -> bool:
        """Return one process, from the first check without a row on; True if it came to the end."""
        task = {
            **{name: getattr(self.arguments, name) for name in TASK},
            "seconds": 60 * self.arguments.minutes - (time.monotonic() - self.started),
            "done": [f"{row['group']}: {row['name']}" for row in self.rows],
            "failed": [f"{row['group']}: {row['name']}" for row in self.rows if row["status"] == FAILED],
        }
        command = [sys.executable, "-m", "gpu_checks.worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.close()
        begun = ended = ""
        for text in self._lines(process):
            line = json.loads(text)
            begun = line.get("begin", "" if "row" in line else begun)
            ended = "yes" if "end" in line else ended
            self.facts, self.speed = line.get("facts", self.facts), line.get("speed", self.speed)
            if "row" in line:
                self._add(Row(**line["row"]))
        status = process.wait()
        if ended:
            return True
        if status == LOST:
            return False
        group, _, name = (begun or "worker: start").partition(": ")
        self._add(Row(group, name, FAILED, f"the process died with status {status}; standard error has its last words"))
        return not begun  # without a check to blame, another process would do the same

    def _lines(self, process: subprocess.Popen[str]) -> Iterator[str]:
        """What the worker says; it is killed when it says nothing for too long."""
        assert process.stdout is not None
        while True:
            timer = threading.Timer(SILENT_SECONDS, process.kill)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                return
            yield line

    def _add(self, row: Row) -> None:
        self.rows.append(row.to_dict())
        spent, message = time.monotonic() - self.started, f": {row.message}" if row.message else ""
        if row.status != PASSED or row.group != "offload":
            print(f"{spent:6.1f} s  {row.status:11} {row.group}: {row.name}{message}", file=sys.stderr, flush=True)
        elif len(self.rows) % 50 == 0:
            print(f"{spent:6.1f} s  {len(self.rows)} checks, now {row.name}", file=sys.stderr, flush=True)


def git_state() -> dict[str, Any]:
    """Return the commit that was checked, and whether files differed from it; nulls outside a repository."""
    commit = git_commit(ROOT)
    return {"commit": commit and commit.removesuffix("+"), "dirty": commit and commit.endswith("+")}


def slug(device: dict[str, Any]) -> str:
    name = str(device.get("name", device.get("device", "unknown"))).lower()
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def show(result: dict[str, Any], out: Path) -> None:
    """The step times, what did not pass, and the verdict."""
    for line in result["speed"].get("modes", []):
        bound = f", {line['times_bound']:.2f} × bound" if "times_bound" in line else ""
        print(f"{line['mode']:44} {line['step_ms']:10.2f} ms, {line['times_resident']:.2f} × resident{bound}")
    for row in result["rows"]:
        if row["status"] in BAD or row["group"] == "target":
            print(f"{row['status']:8} {row['group']}: {row['name']} {row['message']}")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(result["counts"].items()))
    print(f"{'PASSED' if result['passed'] else 'FAILED'}: {counts} in {result['seconds']:.0f} s; {out}")


if __name__ == "__main__":
    sys.exit(main())
