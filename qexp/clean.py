"""Show what failed or was left over in an outputs folder, and remove it.

    python -m qexp.clean                         # shows it, and asks
    python -m qexp.clean --yes --outputs outputs failed scratch

    failed       runs that failed, cannot run here, were cut off, or are damaged
    scratch      offloaded weights, half-saved models and half-written files that killed processes left
    references   references that no run is compared with
    sweeps       sweeps without any remaining run
    quantized    weights that sweeps keep for later loads (loader.cache=auto)

A finished run is never removed, nor anything that a running process holds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qexp.errors import ConfigError, DamagedFileError, DiskError, QexpError, choices, did_you_mean
from qexp.results.manifest import Manifest
from qexp.results.numbers import format_memory
from qexp.results.rows import sweep_names
from qexp.results.run_folder import LOCK, SCRATCH, RunFolder, try_lock
from qexp.sweep.shared_weights import FOLDER as QUANTIZED
from qexp.system.command_parser import CommandParser
from qexp.system.files import disk_error
from qexp.system.memory import GIB
from qexp.system.program_name import program_name
from qexp.system.standard_streams import survive_closed_pipes


@dataclass(frozen=True)
class Leftover:
    """path: a folder or file. folder: the run folder with its lock, None for a sweep. why: for the table."""

    kind: str
    path: Path
    folder: Path | None
    why: str

    @property
    def nbytes(self) -> int:
        paths = [self.path, *self.path.rglob("*")] if self.path.is_dir() else [self.path]
        return sum(path.lstat().st_size for path in paths if path.is_file() or path.is_symlink())


def find_failed(outputs: Path) -> Iterator[Leftover]:
    """Find runs and references without a finished result."""
    for folder in _folders(outputs):
        try:
            status, result = folder.read_status(), folder.read_result()
        except DamagedFileError:
            yield Leftover("failed", folder.path, folder.path, "damaged")
            continue
        if result is not None:  # it has finished; its status was lost, or only scoring it again failed
            continue
        if status is None:
            yield Leftover("failed", folder.path, folder.path, "without a status")
        elif status.status in ("failed", "unsupported"):
            reason = f" ({status.reason})" if status.reason not in (None, status.status) else ""
            yield Leftover("failed", folder.path, folder.path, f"{status.status}{reason}")


def find_scratch(outputs: Path) -> Iterator[Leftover]:
    """Find files that killed processes left in run folders."""
    for folder in _folders(outputs):
        hidden = [path for path in folder.path.glob(".*") if path.name != LOCK]
        for path in [folder.path / SCRATCH, *hidden]:
            if path.exists():
                yield Leftover("scratch", path, folder.path, "left by a process that was killed")


def find_references(outputs: Path) -> Iterator[Leftover]:
    """Find references that no run uses."""
    used = set()
    for path in outputs.glob("runs/*/result.json"):
        with suppress(DiskError):
            used.add((RunFolder(path.parent).read_result() or {}).get("reference"))
    for path in sorted(outputs.glob("references/*")):
        if path.is_dir() and path.name not in used:
            yield Leftover("references", path, path, "no run is compared with it")


def find_sweeps(outputs: Path) -> Iterator[Leftover]:
    """Find finished sweeps without any remaining run."""
    for name in sweep_names(outputs):
        manifest = Manifest(outputs, name)
        with suppress(DiskError):
            values = manifest.read() or {}
            keys = {job["key"] for job in values.get("jobs", []) if job["key"]}
            if not manifest.is_running() and not any((outputs / "runs" / key).exists() for key in keys):
                yield Leftover("sweeps", manifest.folder, None, "none of its runs is there")


def find_quantized(outputs: Path) -> Iterator[Leftover]:
    """Find the quantized weights that sweeps keep; who has them mapped keeps its pages."""
    if (outputs / QUANTIZED).is_dir():
        yield Leftover("quantized", outputs / QUANTIZED, None, "quantized again when they are needed")


KINDS: dict[str, Callable[[Path], Iterator[Leftover]]] = {
    "failed": find_failed,
    "scratch": find_scratch,
    "references": find_references,
    "sweeps": find_sweeps,
    "quantized": find_quantized,
}


def find_leftovers(outputs: Path, kinds: Sequence[str]) -> list[Leftover]:
    """Return everything of these kinds that no process holds, without paths inside another one."""
    found = [leftover for kind in kinds for leftover in KINDS[kind](outputs) if _is_free(leftover)]
    whole = {leftover.path for leftover in found}
    return [leftover for leftover in found if not whole & {*leftover.path.parents}]


def remove(leftover: Leftover) -> bool:
    """Remove it; return False if a process uses its folder by now. Raises DiskError."""
    with try_lock(leftover.folder) as is_free:
        if not is_free:
            return False
        try:
            if leftover.path.is_dir() and not leftover.path.is_symlink():
                shutil.rmtree(leftover.path)
            else:
                leftover.path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(leftover.path, error, "--outputs") from error
    return True


def _folders(outputs: Path) -> Iterator[RunFolder]:
    """Yield the folders of runs and references, without the old runs that `rerun` keeps."""
    for path in sorted([*outputs.glob("runs/*"), *outputs.glob("references/*")]):
        if path.is_dir() and not path.name.startswith("."):
            yield RunFolder(path)


def _is_free(leftover: Leftover) -> bool:
    with try_lock(leftover.folder) as is_free:
        return is_free


def main() -> int:
    """Run the command; return 0 if everything found was removed, or nothing was found."""
    parser = CommandParser(
        prog=program_name("clean"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: failed scratch")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder (default: outputs)")
    parser.add_argument("--yes", action="store_true", help="remove it without a question")
    arguments = parser.parse()
    try:
        check_arguments(arguments.kinds, arguments.outputs)
        return clean(arguments.outputs, arguments.kinds or ["failed", "scratch"], arguments.yes)
    except QexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check_arguments(kinds: Sequence[str], outputs: Path) -> None:
    """Raise ConfigError for an unknown kind, or a folder that is not there."""
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"{kind!r} is not a kind{did_you_mean(kind, KINDS)}; use {choices(KINDS)}")
    if not outputs.is_dir():
        raise ConfigError(f"--outputs {outputs} is not a folder; give the one that paths.outputs= named")


def clean(outputs: Path, kinds: Sequence[str], is_agreed: bool) -> int:
    """Show, ask, remove; the exit code."""
    found = find_leftovers(outputs, kinds)
    if not found:
        print(f"nothing to remove in {outputs} ({', '.join(kinds)})")
        return 0
    for leftover in found:
        print(f"{leftover.kind:<11} {format_memory(leftover.nbytes / GIB):>10}  {leftover.path}  {leftover.why}")
    print(f"{len(found)} in all, {format_memory(sum(leftover.nbytes for leftover in found) / GIB)}")
    if not is_agreed:
        if not sys.stdin.isatty():
            print("nothing is removed: add --yes")
            return 1
        if input("remove all of this? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing is removed")
            return 1
    kept = [leftover.path for leftover in found if not remove(leftover)]
    for path in kept:
        print(f"{path} is in use, and was kept")
    print(f"removed {len(found) - len(kept)}")
    return 1 if kept else 0


if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
