"""A report and what it is made from, in one zip file: `qexp report` and `qexp rerun` work where it is unpacked.

    <name>/README.txt          the commands, and what is not in here
    <name>/report/             report.md, results.csv, table.tex, plots
    <name>/constraints.txt     the versions that the runs had, for pip install -c
    <name>/outputs/sweeps/     the manifests
    <name>/outputs/runs/       the run folders: configuration, environment, result, samples, pictures, logs
    <name>/outputs/references/ what runs were compared with, with their outputs alone

Outputs (outputs.safetensors, logprobs.safetensors) are large and can be computed again; they are in it if wanted. Names
in it are plain: no absolute path, no link, no folder above. The report is made from the packed runs, so that its links
lead into the bundle.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qexp.errors import ConfigError, DiskError
from qexp.report.marks import versions_of_runs
from qexp.report.results_csv import flatten_config
from qexp.report.selection import MANIFEST, Selection, select
from qexp.results.rows import GONE, Row
from qexp.results.run_folder import DAMAGED, PARTIAL, SCRATCH
from qexp.system.files import disk_error, read_json, replacing
from qexp.version import __version__

OUTPUTS = ("outputs.safetensors", "logprobs.safetensors")
COMPOSED = "multirun.yaml"  # a sweep's configuration
LEFT_OUT = (DAMAGED, PARTIAL, SCRATCH, "wandb")  # of a run folder; and names with a leading dot
OF_A_PROCESS = ("pid", "ticks")  # in a manifest: of the machine that ran it
Report = Callable[[Selection, Path], Iterable[Path]]


@dataclass(frozen=True)
class BundleSize:
    """What was packed: runs, files and bytes of the zip."""

    runs: int
    files: int
    nbytes: int


def write_bundle(path: Path, selection: Selection, write_report: Report, *, with_outputs: bool) -> BundleSize:
    """Write the zip file; whole, or not at all.

    Args:
        path: of the zip file; the folder in it has its name.
        write_report: writes the report of a selection into a folder.
        with_outputs: pack what the models produced, and the references.

    Raises: ConfigError for another ending, or two results of one run; DiskError.
    """
    if path.suffix.lower() != ".zip":
        raise ConfigError(f"--bundle {path} must end with .zip")
    if any("copy" in row for row in selection.rows):
        keys = ", ".join(sorted({str(row["key"]) for row in selection.rows if "copy" in row}))
        raise ConfigError(f"--bundle holds one result of a run, and there are two of {keys}; make two bundles")
    runs = {safe_name(str(row["key"])): row["folder"].resolve() for row in selection.rows if row["folder"] is not None}
    with TemporaryDirectory(prefix="qexp-bundle-") as folder:
        root = Path(folder, safe_name(path.stem))
        words = _stage(root / "outputs", selection, runs)
        list(write_report(select(root / "outputs", words), root / "report"))
        (root / "constraints.txt").write_text(constraints_of(selection.rows), encoding="utf-8")
        (root / "README.txt").write_text(_readme(selection, words, with_outputs), encoding="utf-8")
        references = _references_of(runs.values()) if with_outputs else {}
        members = dict(_members(root, root.name))
        for kind, folders in (("runs", runs), ("references", references)):
            for name, run in folders.items():
                members |= dict(_run_members(run, f"{root.name}/outputs/{kind}/{name}", with_outputs))
        _write_zip(path, members)
    return BundleSize(len(runs), len(members), path.stat().st_size)


def safe_name(name: str) -> str:
    """Return a name that is a plain one of a file on every system."""
    return re.sub(r"[^\w.+=-]+", "_", name).strip("._") or "unnamed"


def constraints_of(rows: Sequence[Row]) -> str:
    """Return the versions of all runs, as pip takes them; of a package with several, each in a comment."""
    lines = []
    for package, versions in versions_of_runs(row["env"] or {} for row in rows).items():
        several = len(versions) > 1 or package == "qexp"  # itself: it is installed from its source
        lines += [f"{'# ' if several else ''}{package}=={version}" for version in versions]
    return "\n".join(lines) + "\n"


def _stage(outputs: Path, selection: Selection, runs: Mapping[str, Path]) -> list[str]:
    """Lay out manifests, and links to the run folders; return the words that select the same rows there."""
    (outputs / "runs").mkdir(parents=True)
    for name, run in runs.items():
        (outputs / "runs" / name).symlink_to(run, target_is_directory=True)
    words: list[str] = []
    for sweep in (sweep for sweep in selection.sweeps if sweep.folder is not None):
        name, number = safe_name(sweep.name), 2
        while name in words:
            name, number = f"{safe_name(sweep.name)}-{number}", number + 1
        words.append(name)
        values = {key: value for key, value in sweep.manifest.items() if key not in OF_A_PROCESS}
        jobs = [{**job, "key": safe_name(job["key"]) if job["key"] else ""} for job in values["jobs"]]
        folder = outputs / "sweeps" / name
        folder.mkdir(parents=True)
        text = json.dumps({**values, "name": name, "jobs": jobs}, indent=2, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if sweep.folder is not None and (sweep.folder / COMPOSED).is_file():
            shutil.copyfile(sweep.folder / COMPOSED, folder / COMPOSED)
    alone = [sweep.rows for sweep in selection.sweeps if sweep.folder is None]
    return words + [safe_name(str(row["key"])) for rows in alone for row in rows]


def _members(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yield (name in the zip, file); links are left out: they may lead anywhere."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _members(entry, f"{name}/{entry.name}")
        elif entry.is_file():
            yield f"{name}/{entry.name}", entry


def _run_members(run: Path, name: str, with_outputs: bool) -> Iterator[tuple[str, Path]]:
    left_out = (*LEFT_OUT, *(() if with_outputs else OUTPUTS))
    for member, path in _members(run, name):
        if path.relative_to(run).parts[0] not in left_out:
            yield member, path


def _references_of(runs: Iterable[Path]) -> dict[str, Path]:
    """Return key -> folder of what the runs were compared with, where it is still there."""
    found = {}
    for run in runs:
        key = (read_json(run / "result.json") or {}).get("reference")
        if key and (folder := run.parents[1] / "references" / str(key)).is_dir():
            found[safe_name(str(key))] = folder
    return found


def _readme(selection: Selection, words: Sequence[str], with_outputs: bool) -> str:
    rows = [row for row in selection.rows if row["folder"] is not None]
    gone = [str(row["key"]) for row in selection.rows if row["status"] in GONE]
    missing = [f"Missing or damaged, and so not in here: {', '.join(gone)}."] if gone else []
    outputs = [] if with_outputs else ["What the models produced (outputs.safetensors) is not in here."]
    paths = sorted({line for row in rows if row["config"] for line in _outside_paths(row["config"])})
    needs = (
        ["The runs read these files of the machine that they ran on:", *(f"    {p}" for p in paths)] if paths else []
    )
    first = next((safe_name(str(row["key"])) for row in rows), "<key>")
    return "\n".join([
        f"{selection.title}: a report of qexp {__version__}. Read report/report.md (or report.html, if it is there).",
        "",
        "In this folder, with qexp installed (pip install -c constraints.txt for the versions of the runs):",
        "",
        f"    qexp report {' '.join(words)}".rstrip(),
        f"    qexp rerun outputs/runs/{first}",
        "",
        *outputs, *missing, *needs,
    ]) + "\n"  # fmt: skip


def _outside_paths(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield 'model.path=/models/llama' for each setting that is an absolute path, but for results and caches."""
    for name, value in flatten_config(config):
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one.startswith("/") and not name.startswith(("paths.", "save.", "loader.")):
                yield f"{name}={one}"


def _write_zip(path: Path, members: Mapping[str, Path]) -> None:
    """Pack the files; those that are compressed already are stored as they are. Raises DiskError."""
    with replacing(path) as beside:
        try:
            with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
                for name, source in members.items():
                    is_packed = source.suffix in (".png", ".webp", ".jpg", ".safetensors", ".mp4")
                    file.write(source, name, zipfile.ZIP_STORED if is_packed else None)
        except OSError as error:
            if error.filename is not None and Path(error.filename) != beside:
                raise DiskError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from error
            raise disk_error(path, error, "--bundle") from error
