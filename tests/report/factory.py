"""Sweeps on disk as the program leaves them, with numbers chosen by the test."""

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

GENERATE = {
    "load/peak_host_gib": 0.02, "memory/run_peak_host_gib": 0.03, "memory/run_peak_device_gib": 0.0,
    "memory/weights_gib": 0.004, "memory/bits_per_weight": 4.5, "time/step_ms": 12.0, "quality/psnr_db": 24.5,
    "quality/exact": 0, "quality/ssim": 0.91, "quality/class_accuracy": 0.93,
}  # fmt: skip
ROUNDTRIP = {
    "memory/weights_gib": 0.004, "memory/bits_per_weight": 4.5, "roundtrip/sqnr_db_mean": 20.7,
    "roundtrip/sqnr_db_min": 19.9, "roundtrip/max_abs_error": 0.012,
}  # fmt: skip
ENV = {
    "versions": {"qexp": "0.1.0", "torch": "2.13.0", "bitsandbytes": "0.50.2", "gguf": None},
    "python": "3.11.7", "platform": "Linux-6.1", "host": "bench-1", "cpu": "Example CPU", "cores": 2, "memory_gib": 8.0,
    "threads": "2", "device": "cpu", "device_name": "Example CPU", "commit": "0123456789abcdef+",
    "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip


def config(
    backend: str = "bitsandbytes",
    label: str | None = "nf4",
    offload: str = "none",
    task: str = "generate",
    **other: Any,
) -> dict[str, Any]:
    """A container as in config.yaml; `other` are further fields of the backend."""
    return {
        "model": {"source": "digits", "path": None, "skip_modules": []},
        "components": {
            "transformer": {
                "backend": {"quant_method": backend, "label": label, **other},
                "skip_modules": ["proj_out"], "keep_in_fp32_modules": [], "compute_dtype": None,
            }
        },
        "offload": {"strategy": offload, "to": "disk" if offload != "none" else "auto", "num_blocks_per_group": 1},
        "task": {"name": task},
        "metrics": {"names": ["psnr_db", "ssim"]},
        "tracking": {"mode": "offline", "project": "qexp", "entity": None, "tags": ["mine"]},
        "isolation": {"mode": "process", "timeout_minutes": None},
        "sweep": {"name": "first", "notes": None},
        "loader": {"in_flight_mib": 64, "workers": None},
        "reference": {"dtype": None, "offload": "none"},
        "paths": {"outputs": "outputs"}, "save": {"path": None, "max_shard_gib": 5.0},
        "device": "cpu", "seed": 0, "resume": "missing",
    }  # fmt: skip


def run_folder(
    outputs: Path,
    key: str,
    container: dict[str, Any],
    metrics: dict[str, float | None] | None = None,
    status: str = "done",
    reason: str | None = None,
    message: str = "",
) -> Path:
    """outputs/runs/<key>; with metrics also the result, pictures and histories of its task."""
    folder = outputs / "runs" / key
    (folder / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(container, Dumper=yaml.CSafeDumper))
    (folder / "env.json").write_text(json.dumps(ENV))
    times = {"pid": 1, "started": "2026-01-02T03:04:05", "finished": "2026-01-02T03:04:15", "seconds": 10.0}
    (folder / "status.json").write_text(json.dumps({"status": status, "reason": reason, "message": message, **times}))
    if metrics is None:
        return folder
    result = {"schema": 1, "key": key, "status": "done", "config": container, "metrics": metrics, "env": ENV}
    (folder / "result.json").write_text(json.dumps(result | {"scored": container["metrics"]}))
    if container["task"]["name"] == "roundtrip":
        rows = ["layer,shape,quantized,sqnr_db", "blocks.0.attn.to_q,256x256,true,20.7", "proj_out,4x256,false,"]
        (folder / "layers.csv").write_text("\n".join(rows) + "\n")
    else:
        steps = ["step,step_ms,host_gib,device_gib,relative_l2"]
        steps += ["0,12.5,0.5,0.0,0.01", "1,11.5,0.5,0.0,", "2,12.0,0.6,0.0,0.03"]
        (folder / "history.csv").write_text("\n".join(steps) + "\n")
        for name, shade in (("grid", 10), ("reference", 20), ("difference", 30)):
            Image.new("L", (40, 40), shade).save(folder / "images" / f"{name}.png")
    return folder


def job(number: int, key: str, overrides: list[str], status: str = "done", **other: Any) -> dict[str, Any]:
    defaults = {"reason": None, "message": "", "reused": False, "seconds": 10.0}
    return {"number": number, "key": key, "overrides": overrides, "status": status, **defaults, **other}


def manifest(outputs: Path, name: str, jobs: list[dict[str, Any]], started: str = "2026-01-02T03:04:05") -> Path:
    folder = outputs / "sweeps" / name
    folder.mkdir(parents=True)
    command = ["python", "-m", "qexp", "-m", "backend=none,bitsandbytes", "sweep.notes=why I ran it"]
    times = {"started": started, "finished": "2026-01-02T03:14:05"}
    content = {"name": name, "command": command, "notes": "why I ran it", "total": len(jobs), **times, "jobs": jobs}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def sweep_of_six(outputs: Path) -> str:
    """Two backends under two offloads, one experiment out of memory and one this machine cannot run."""
    none = GENERATE | {"memory/weights_gib": 0.016, "memory/bits_per_weight": 32.0}
    none |= {"quality/psnr_db": None, "quality/exact": 1}
    jobs = []
    for number, (backend, label, offload, metrics) in enumerate(
        [("none", "none", "none", none), ("none", "none", "leaf", none),
         ("bitsandbytes", "nf4", "none", GENERATE), ("bitsandbytes", "nf4", "leaf", GENERATE | {"time/step_ms": 30.0})]
    ):  # fmt: skip
        run_folder(outputs, f"key{number}", config(backend, label, offload), metrics)
        jobs.append(job(number, f"key{number}", [f"backend={backend}", f"offload={offload}"], reused=number == 0))
    run_folder(outputs, "key4", config("quanto", "int2"), None, "failed", "oom", "out of memory:\n needed 9 GiB")
    jobs.append(job(4, "key4", ["backend=quanto_int2", "offload=none"], "failed", reason="oom", message="old text"))
    jobs.append(job(5, "", ["backend=torchao_float8dq"], "unsupported", reason="unsupported", message="needs a GPU"))
    manifest(outputs, "first", jobs)
    return "first"


def sweep_of_seeds(outputs: Path) -> str:
    """nf4 with three seeds, of which one is better than int8 with one seed; the third one stands in the sweep twice."""
    jobs = []
    for seed, psnr in enumerate((10.0, 20.0, 30.0)):
        metrics = GENERATE | {"quality/psnr_db": psnr, "time/step_ms": 12.0 + seed}
        run_folder(outputs, f"nf4-{seed}", config() | {"seed": seed}, metrics)
        jobs.append(job(len(jobs) + 1, f"nf4-{seed}", ["backend=bitsandbytes", f"seed={seed}"]))
    int8 = GENERATE | {"quality/psnr_db": 25.0, "memory/weights_gib": 0.008}
    run_folder(outputs, "int8-0", config("quanto", "int8"), int8)
    jobs.append(job(4, "int8-0", ["backend=quanto", "seed=0"]))
    jobs.append(job(5, "nf4-2", ["backend=bitsandbytes", "seed=2"], reused=True))
    manifest(outputs, "seeds", jobs)
    return "seeds"
