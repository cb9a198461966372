"""Sweeps with what real runs leave: pictures beside their references, steps, layers, texts; numbers are made."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from qexp.report.comparison import prepare_compared, read_all_samples
from qexp.report.html.document import report_document
from qexp.results.rows import read_manifest, rows_of_sweep
from tests.report.factory import ENV, GENERATE, config, job, manifest

FORMATS = (
    ("none", "none", 16.0), ("bitsandbytes", "nf4", 4.5), ("bitsandbytes", "fp4", 4.5),
    ("bitsandbytes", "llm.int8", 8.1), ("torchao", "int8wo", 8.13), ("torchao", "float8wo_e4m3", 8.11),
    ("quanto", "int2", 2.25), ("quanto", "int4", 4.25), ("quanto", "int8", 8.05), ("gguf", "Q4_0", 4.5),
    ("gguf", "Q8_0", 8.5), ("qexp_packed", "uint3wo", 3.5), ("qexp_packed", "fp6_e2w3", 6.25),
)  # fmt: skip
HOSTILE = '</script><script>alert(1)</script> "quoted" \'n <b>bold</b> & {{ 7*7 }} \u2028 日本'


def document_of(outputs: Path, name: str, baseline: str | None = None) -> dict[str, Any]:
    """The document of a sweep's report, as the command makes it."""
    rows = rows_of_sweep(outputs, name)
    assert not list(read_all_samples(rows))
    prepared = prepare_compared(rows, baseline)
    folder = outputs / "sweeps" / name
    return report_document(f"Sweep {name}", [(read_manifest(outputs, name), rows)], rows, prepared, folder)


def scene(side: int, seed: int) -> Any:
    """An image [3, side, side] in [-1, 1] with slopes, edges and some noise, as photographs have."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    planes = []
    for _ in range(3):
        cx, cy, size = generator.uniform((0.2, 0.2, 0.1), (0.8, 0.8, 0.35))
        disk = np.tanh(12 * (size - np.hypot(x - cx, y - cy)))
        waves = np.sin(6.3 * (generator.uniform(1, 4) * x + generator.uniform(1, 4) * y))
        planes.append(0.5 * disk + 0.3 * waves + 0.2 * (x - y))
    return np.clip(np.stack(planes) + generator.normal(0, 0.02, (3, side, side)), -1, 1).astype(np.float32)


def save_images(folder: Path, images: Any, **others: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"images": images, "labels": np.arange(len(images)), **others}, folder / "outputs.safetensors")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def made_run(outputs: Path, key: str, container: dict[str, Any], metrics: dict[str, Any], reference: str = "") -> Path:
    """A finished run without outputs: its configuration, result and steps."""
    folder = outputs / "runs" / key
    folder.mkdir(parents=True)
    text = yaml.dump(container, Dumper=yaml.CSafeDumper, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    times = {"pid": 1, "started": "2026-01-02T03:04:05", "finished": "2026-01-02T03:04:15", "seconds": 10.0}
    (folder / "status.json").write_text(json.dumps({"status": "done", "reason": None, "message": "", **times}))
    result = {"schema": 1, "key": key, "config": container, "metrics": metrics, "env": ENV, "reference": reference}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def steps_of(step_ms: float, error: float, count: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "step_ms": step_ms * (2 if step == 1 else 1 + 0.05 * math.sin(step)),
            "host_gib": 0.43 + 0.002 * min(step, 8), "device_gib": 0.0, "relative_l2": error * step / count,
        }
        for step in range(1, count + 1)
    ]  # fmt: skip


def metrics_of(bits: float, number: int) -> dict[str, Any]:
    """Numbers that hang together: more bits, more memory and less error."""
    psnr = None if bits == 16 else 6.02 * bits + 14 + number % 3
    return GENERATE | {
        "memory/weights_gib": 0.0006 * bits, "memory/bits_per_weight": bits, "quality/psnr_db": psnr,
        "quality/exact": int(bits == 16), "quality/ssim": 1 - 2.0 ** (-bits), "quality/images": 8,
        "quality/differing_images": 0 if bits == 16 else 8, "time/step_ms": 100 + number, "load/seconds": 0.4,
        "load/peak_host_gib": 0.004 + 0.0006 * bits, "load/baseline_host_gib": 0.425, "quality/finite": 1.0,
        "time/measured_steps": 19,
    }  # fmt: skip


def sweep_with_pictures(outputs: Path, name: str = "pictures", side: int = 96, images: int = 8) -> str:
    """25 experiments: 13 formats in two offloads, of which two fail; a prompt and a message are hostile."""
    prompts = [HOSTILE, *(f"A red cube on a green table, number {number}" for number in range(1, images))]
    reference = outputs / "references" / "ref"
    originals = np.stack([scene(side, number) for number in range(images)])
    save_images(reference, originals)
    jobs = []
    for number in range(1, 24):
        backend, label, bits = FORMATS[(number - 1) % len(FORMATS)]
        offload = "none" if number <= len(FORMATS) else "leaf"
        container = config(backend, label, offload)
        container["task"] |= {"prompt": prompts, "num_images": None}
        key = f"key{number:02}"
        metrics = metrics_of(bits, number)
        folder = made_run(outputs, key, container, metrics, "ref")
        noise = np.random.default_rng(number).normal(0, 2.0 ** (1 - bits), originals.shape) if bits < 16 else 0
        save_images(folder, np.clip(originals + noise, -1, 1).astype(np.float32))
        write_csv(folder / "history.csv", steps_of(100 + number, 2.0 ** (-bits)))
        if (psnr := metrics["quality/psnr_db"]) is not None:
            write_csv(folder / "samples.csv", [
                {"seed": 0, "sample": f"image {place}", "metric": "quality/psnr_db", "weight": 1}
                | {"value": psnr + place / 3 - (images - 1) / 6} for place in range(images)
            ])  # fmt: skip
        jobs.append(job(number, key, [f"backend={backend}", f"offload={offload}"]))
    jobs.append(job(24, "", ["backend=quanto_int2", "offload=block"], "failed", reason="oom", message=HOSTILE))
    jobs.append(job(25, "", ["backend=torchao_float8dq"], "unsupported", reason="unsupported", message="needs a GPU"))
    manifest(outputs, name, jobs)
    return name


def sweep_of_many(outputs: Path, count: int = 500, name: str = "many") -> str:
    """Runs without pictures, each with 20 steps and a setting of its own."""
    jobs = []
    for number in range(1, count + 1):
        backend, label, bits = FORMATS[number % len(FORMATS)]
        container = config(backend, label, ("none", "leaf", "block")[number % 3], threshold=number)
        key = f"many{number:03}"
        folder = made_run(outputs, key, container, metrics_of(bits + number / 1000, number))
        write_csv(folder / "history.csv", steps_of(100 + number, 2.0 ** (-bits)))
        jobs.append(job(number, key, [f"backend={backend}", f"backend.threshold={number}"]))
    manifest(outputs, name, jobs)
    return name


def sweep_of_layers(outputs: Path, name: str = "layers", layers: int = 12) -> str:
    """Three round trips and the scores of one model."""
    jobs = []
    for number, (backend, label, bits) in enumerate(FORMATS[1:4], start=1):
        metrics = {"memory/weights_gib": bits / 1000, "roundtrip/sqnr_db_mean": 6 * bits}
        folder = made_run(outputs, f"trip{number}", config(backend, label, task="roundtrip"), metrics)
        exact = {"component": "transformer", "layer": "blocks.0.attn.to_q", "sqnr_db": "", "max_abs_error": 0}
        others = [
            exact | {"layer": f"blocks.{layer}.attn.to_q", "sqnr_db": 6 * bits - layer, "max_abs_error": 0.1}
            for layer in range(1, layers)
        ]
        write_csv(folder / "layers.csv", [exact, *others])
        jobs.append(job(number, f"trip{number}", [f"backend={backend}", "task=roundtrip"]))
    folder = made_run(outputs, "scores", config("none", "none", task="sensitivity"), {})
    scores = [
        {"component": "transformer", "group": f"blocks.{layer}", "layers": "", "format": form, "backend": "{}"}
        | {"bytes": 1, "score": 0.0 if form == "none" else 10.0 ** -(layer + place)}
        for layer in range(4)
        for place, form in enumerate(("none", "nf4", "int8"))
    ]
    write_csv(folder / "sensitivity.csv", scores)
    (folder / "sensitivity.json").write_text(json.dumps({"unit": "squared error of the output"}))
    jobs.append(job(4, "scores", ["task=sensitivity"]))
    manifest(outputs, name, jobs)
    return name


def sweep_of_texts(outputs: Path, name: str = "texts") -> str:
    """A language model in two formats; one text is the reference's, one differs in a word, one is hostile."""
    jobs = []
    rows = [
        {"prompt": "12+30=", "text": "42", "reference": "42", "same": 1},
        {"prompt": "The capital of", "text": " France is Lyon, I say.", "reference": " France is Paris.", "same": 0},
        {"prompt": HOSTILE, "text": HOSTILE, "reference": "", "same": 0},
    ]
    for number, (backend, label, bits) in enumerate((FORMATS[0], FORMATS[1]), start=1):
        metrics = {"memory/weights_gib": bits / 1000, "quality/perplexity": 8 + 1 / bits, "quality/prompts": 3}
        folder = made_run(outputs, f"text{number}", config(backend, label), metrics)
        write_csv(folder / "compared_texts.csv", rows)
        jobs.append(job(number, f"text{number}", [f"backend={backend}"]))
    manifest(outputs, name, jobs)
    return name


def sweep_of_failures(outputs: Path, name: str = "failures") -> str:
    """Two experiments that ended before they had a folder."""
    jobs = [
        job(number, "", [f"backend={number}"], "failed", reason="config", message=HOSTILE) for number in range(1, 3)
    ]
    manifest(outputs, name, jobs)
    return name
