"""A sweep of small experiments, as its user waits for it: workers that are forked beside workers that are spawned.

    python scripts/bench_sweep.py            # 12 and 48 experiments, 1,000 finished ones: about twenty minutes
    python scripts/bench_sweep.py --quick    # 2 experiments, 20 finished ones: a minute

Each sweep is a command of its own with an empty folder for its outputs; all settings are the defaults, so that
references are computed and runs are logged to Weights & Biases, offline. An experiment is 16 embedded digits in 5
steps. Reported:

- fork, spawn: wall and CPU seconds of the command, all its processes included, and spawn over fork. The load average
  before each says how far wall seconds can be believed.
- gap_seconds: from the end of one experiment's own work (result.json is written) to the beginning of the next one's
  (env.json is), with fork, where no reference is computed in between. Median and largest.
- single: `python -m qexp seed=1 backend=quanto` on digits, from Enter to the result, its reference known; all settings
  are the defaults. import_seconds: of a fresh Python that imports torch, which no command can do without.
- pass_over: a sweep over experiments that are all finished. compose_seconds is Hydra's own part, measured apart by
  composing the same experiments and doing nothing with them; beyond_seconds is the rest. Memory of the parent
  (anonymous, MiB) after a tenth of the experiments, and after all.

Exits with 1 if a target is missed, which may be the machine's doing if it is busy: see TARGETS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benching import MIB, bench_parser, machine, medians, resident_bytes, timed, write_result

SMALL = ("task.num_images=16", "task.num_inference_steps=5", "sweep.name=bench")
SWEEPS = {
    2: ("backend=bitsandbytes,quanto",),
    12: ("backend=bitsandbytes,torchao,quanto,gguf_q4_0", "offload=none,leaf,block"),
    48: ("backend=bitsandbytes,torchao,quanto,gguf_q4_0", "offload=none,leaf,block", "seed=0,1,2,3"),
}
TARGETS = {
    "ratio_12": 3.5,
    "ratio_48": 5.0,
    "gap_seconds": 0.5,
    "single_seconds": 9.0,
    "beyond_seconds": 20.0,
    "growth_mib": 8.0,
}
SINGLE_REPEATS = 3


def main() -> int:
    parser = bench_parser(__doc__, "sweep.json")
    parser.add_argument("--experiments", type=int, nargs="+", default=[12, 48], choices=SWEEPS)
    parser.add_argument("--finished", type=int, default=1000, help="experiments that are passed over; 0: none")
    parser.add_argument("--quick", action="store_true", help="2 experiments, 20 finished ones; targets are not checked")
    parser.add_argument("--folder", help="where to keep outputs meanwhile; default: the system's temporary folder")
    parser.add_argument("--compose", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compose is not None:
        compose_only(arguments.compose)
        return 0
    if arguments.quick:
        arguments.experiments, arguments.finished = [2], 20
    found: dict[str, Any] = {"machine": machine(), "settings": SMALL, "sweeps": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        sweep(Path(root, "warm"), SWEEPS[2], "fork")  # compiled files, page cache
        for count in arguments.experiments:
            found["sweeps"].append(compare(Path(root), count))
            write_result(arguments.out, found)  # what is measured is kept, whatever comes next
        found["single"] = single(Path(root), 1 if arguments.quick else SINGLE_REPEATS)
        write_result(arguments.out, found)
        if arguments.finished:
            found["pass_over"] = pass_over(Path(root), arguments.finished)
            write_result(arguments.out, found)
    missed = [] if arguments.quick else misses(found)
    print("\n".join(missed))
    return 1 if missed else 0


def compare(root: Path, count: int) -> dict[str, Any]:
    """Return the same sweep with either way to start workers."""
    row: dict[str, Any] = {"experiments": count}
    for start in ("fork", "spawn"):
        outputs = root / f"{count}_{start}"
        row[start] = sweep(outputs, SWEEPS[count], start)
        if start == "fork":
            row["gap_seconds"] = spread(gaps(outputs))
        shutil.rmtree(outputs)
    for kind in ("wall", "cpu"):
        row[f"{kind}_ratio"] = row["spawn"][f"{kind}_seconds"] / row["fork"][f"{kind}_seconds"]
    print(describe(row), flush=True)
    return row


def describe(row: dict[str, Any]) -> str:
    parts = (
        f"{kind} {row['fork'][f'{kind}_seconds']:.1f} s forked, {row['spawn'][f'{kind}_seconds']:.1f} s spawned "
        f"({row[f'{kind}_ratio']:.2f}x)"
        for kind in ("wall", "cpu")
    )
    gap = row["gap_seconds"]
    between = f"between two {gap['median']:.2f} s, at most {gap['max']:.2f}"
    return f"{row['experiments']} experiments: {', '.join(parts)}; {between}"


def sweep(outputs: Path, overrides: Sequence[str], start: str) -> dict[str, float]:
    """Run a sweep; returns what it took. Raises SystemExit if a worker did not start as it was to."""
    command = [*overrides, *SMALL, f"paths.outputs={outputs}", f"isolation.start={start}", "-m"]
    taken = timed([sys.executable, "-m", "qexp", *command], outputs.with_suffix(".log"))
    started = {json.loads(path.read_text(encoding="utf-8"))["start"] for path in outputs.glob("r*/*/result.json")}
    if started != {start}:
        raise SystemExit(f"{outputs}: workers started by {started}, not by {start}")
    return taken


def single(root: Path, repeats: int) -> dict[str, float]:
    """Return medians of one experiment by itself, and of importing torch."""
    outputs, runs = root / "single", list[dict[str, float]]()
    command = [sys.executable, "-m", "qexp", "seed=1", f"paths.outputs={outputs}"]
    timed([*command, "backend=bitsandbytes"], root / "reference.log")  # it computes the reference
    for _ in range(repeats):
        shutil.rmtree(outputs / "runs")
        runs.append(timed([*command, "backend=quanto"], root / "single.log"))
    imports = [timed([sys.executable, "-c", "import torch"], root / "import.log") for _ in range(repeats)]
    found = medians(runs) | {"import_seconds": statistics.median(run["wall_seconds"] for run in imports)}
    print(f"single: {found['wall_seconds']:.1f} s wall, {found['cpu_seconds']:.1f} s CPU", flush=True)
    return found


def gaps(outputs: Path) -> Iterator[float]:
    """Yield seconds between the end of one experiment's work and the beginning of the next one's."""
    folders = sorted(outputs.glob("r*/*/"), key=began_at)  # runs and references
    for one, following in pairwise(folders):
        if "references" not in (one.parent.name, following.parent.name):
            yield began_at(following) - (one / "result.json").stat().st_mtime


def began_at(folder: Path) -> float:
    return (folder / "env.json").stat().st_mtime


def spread(values: Iterator[float]) -> dict[str, float]:
    found = list(values)
    return {"median": statistics.median(found), "max": max(found), "n": len(found)}


def pass_over(root: Path, count: int) -> dict[str, Any]:
    """Return a sweep over `count` experiments that are finished."""
    outputs, memory = root / "finished", dict[int, float]()
    make_finished(outputs, count)
    overrides = ["-m", "backend=quanto", f"seed=range({count})", *SMALL, f"paths.outputs={outputs}"]
    composed = timed([sys.executable, __file__, "--compose", *overrides], root / "compose.log")
    jobs = outputs / "sweeps" / "bench" / "jobs.jsonl"

    def watch(pid: int) -> None:
        if jobs.exists():
            passed = jobs.read_bytes().count(b"\n")
            memory[passed] = resident_bytes(pid)["anon"] / MIB

    log = root / "finished.log"
    total = timed([sys.executable, "-m", "qexp", *overrides], log, watch)
    if f"{count} done ({count} reused)" not in log.read_text(encoding="utf-8"):
        raise SystemExit(f"{log.read_text(encoding='utf-8')}\nsome of the experiments were not passed over")
    found = {
        "experiments": count,
        **total,
        "compose_seconds": composed["wall_seconds"],
        "beyond_seconds": total["wall_seconds"] - composed["wall_seconds"],
        "beyond_cpu_seconds": total["cpu_seconds"] - composed["cpu_seconds"],
        "mib_after_a_tenth": memory[min(passed for passed in memory if passed >= count // 10)],
        "mib_after_all": memory[max(memory)],
    }
    print(
        f"{count} finished experiments: {found['wall_seconds']:.1f} s, of which Hydra {found['compose_seconds']:.1f}; "
        f"parent {found['mib_after_a_tenth']:.1f} MiB after a tenth, {found['mib_after_all']:.1f} after all"
    )
    return found


def make_finished(outputs: Path, count: int) -> None:
    """One experiment that ran, and under the keys of other seeds what it left."""
    from qexp.experiments.stored import run_config_from_container
    from qexp.results.run_folder import RunFolder
    from qexp.sweep.reference import prepare_folder
    from qexp.sweep.run_key import run_key
    from qexp.system.files import read_yaml

    sweep(outputs, ("backend=quanto", "seed=choice(0)"), "fork")
    (first,) = (outputs / "runs").iterdir()
    config = run_config_from_container(read_yaml(first / "config.yaml") or {})
    result = RunFolder(first).read_result() or {}
    for seed in range(1, count):
        other = replace(config, seed=seed)
        folder = RunFolder(first.with_name(run_key(other)))
        shutil.copytree(first, folder.path, copy_function=os.link)  # files are replaced, never written to
        prepare_folder(folder, other, (f"seed={seed}",), clear=False)
        folder.write_json("result.json", {**result, "key": folder.key, "config": other.to_container()})


def compose_only(arguments: Sequence[str]) -> None:
    """What Hydra does for a sweep whose experiments do nothing."""
    import hydra

    from qexp.config.hydra_schema import register_schemas
    from qexp.config.yaml_options import conf_folder

    register_schemas()
    sys.argv[1:] = [*arguments, "sweep.dry_run=true"]  # no manifest, no table
    hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(lambda cfg: None)()


def misses(found: dict[str, Any]) -> list[str]:
    """Return the targets that were missed, of what was measured."""
    measured = {f"ratio_{row['experiments']}": row["wall_ratio"] for row in found["sweeps"]}
    gap = max((row["gap_seconds"]["median"] for row in found["sweeps"]), default=0.0)
    missed = [
        f"{name} is {value:.2f}, below {TARGETS[name]}" for name, value in measured.items() if value < TARGETS[name]
    ]
    limits = {"gap_seconds": gap}
    if "single" in found:
        limits["single_seconds"] = found["single"]["wall_seconds"]
    if passed := found.get("pass_over"):
        limits["beyond_seconds"] = passed["beyond_seconds"]
        limits["growth_mib"] = passed["mib_after_all"] - passed["mib_after_a_tenth"]
    return missed + [
        f"{name} is {value:.2f}, above {TARGETS[name]}" for name, value in limits.items() if value > TARGETS[name]
    ]


if __name__ == "__main__":
    sys.exit(main())
