"""Recognize files and folders that are often given in place of a checkpoint, by their first bytes, with a remedy each.

A failed download leaves a git-lfs pointer, a web page or an empty file. Older weights are pickles, which run code when
they are opened; qexp never opens them. The models of a hub's cache are two folders below its root.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from io import BufferedReader
from pathlib import Path

from qexp.errors import WrongFileError, choices, first_names

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = (
    "import sys, torch, safetensors.torch as s; w = {}; "
    "[w.update(torch.load(f, map_location='cpu', weights_only=True)) for f in sys.argv[2:]]; "
    "w = {n: t.clone().contiguous() for n, t in w.get('state_dict', w).items() if hasattr(t, 'clone')}; "
    "s.save_file(w, sys.argv[1])"  # clones: tied weights share memory, which the format refuses
)
HEAD_BYTES = 512  # enough for a page that begins with blank lines or a comment
CACHE_PREFIX, SNAPSHOTS = "models--", "snapshots"
REAL_FILES = ("config.json", "model_index.json")  # of a folder that is a model, whatever else it holds


def refuse_foreign(file: Path, stream: BufferedReader) -> None:
    """Raise WrongFileError for a file recognized as neither a checkpoint nor JSON; rewind the stream."""
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise WrongFileError(f"'{file}' is empty (0 bytes): its download failed; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WrongFileError(
            f"'{file}' is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download it "
            "again with `hf download user/name`"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<!--")):
        raise WrongFileError(
            f"'{file}' is a web page, not a checkpoint: its address led to a page, or the download needed a login; "
            "download it again with `hf download user/name`"
        )
    if _is_pickle(head):
        raise WrongFileError(
            f"'{file}' is a PyTorch pickle or a zip archive, not safetensors; {convert_remedy([file])}"
        )


def refuse_other_format(file: Path, stream: BufferedReader, *, wants_gguf: bool) -> None:
    """Raise WrongFileError for GGUF in a .safetensors file, or the reverse."""
    head = stream.read(9)
    stream.seek(0)
    if wants_gguf and head[8:9] == b"{":
        raise WrongFileError(
            f"'{file}' holds safetensors, not GGUF; rename it to '{file.stem}.safetensors', or download it again"
        )
    if not wants_gguf and head.startswith(b"GGUF"):
        raise WrongFileError(
            f"'{file}' holds GGUF, not safetensors; rename it to '{file.stem}.gguf', or download it again"
        )


def _is_pickle(head: bytes) -> bool:
    """Recognize pickles of protocol 2 and later, and zips. A safetensors header length may look like one."""
    is_protocol = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return head[8:9] != b"{" and (is_protocol or head.startswith(b"PK\x03\x04"))


def convert_remedy(files: Sequence[Path]) -> str:
    """Return the command that converts the first pickle, or all shards of one model, to safetensors."""
    files = [file for file in files if "-of-" in file.name] or files[:1]
    target = files[0].with_suffix(".safetensors") if len(files) == 1 else files[0].parent / "model.safetensors"
    names = " ".join(shlex.quote(str(file)) for file in (target, *files))
    return f'convert it, if you trust it: python -c "{CONVERT}" {names}'


def pickles_in(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the pickles in a folder, by name; small ones are left by training and hold no weights."""
    no_weights = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
    return [folder / name for name in sorted(names) if name.endswith(PICKLE_SUFFIXES) and name not in no_weights]


def refuse_cache_folder(folder: Path) -> None:
    """Raise WrongFileError for a folder of a hub's cache above the models' snapshots."""
    names = sorted(os.listdir(folder)) if folder.is_dir() and os.access(folder, os.R_OK) else []
    if any(name in names for name in REAL_FILES) or any(name.endswith((".safetensors", ".gguf")) for name in names):
        return
    repositories = [_repository(name) for name in names if name.startswith(CACHE_PREFIX)]
    if repositories:
        raise WrongFileError(
            f"'{folder}' is a hub's cache of {len(repositories)} models; set model.path to the name of one: "
            f"{first_names(repositories)}"
        )
    snapshots = folder if folder.name == SNAPSHOTS and folder.parent.name.startswith(CACHE_PREFIX) else None
    if SNAPSHOTS in names and (folder / SNAPSHOTS).is_dir():
        snapshots = folder / SNAPSHOTS
    if snapshots is None:
        return
    name = snapshots.parent.name
    by_name = f"{_repository(name)} or " if name.startswith(CACHE_PREFIX) else ""
    found = [f"'{path}'" for path in sorted(snapshots.iterdir()) if path.is_dir()]
    remedy = f"set model.path to {by_name}{choices(found)}" if found else "it has no snapshot: download the model again"
    raise WrongFileError(f"'{folder}' is a repository in a hub's cache, and its models are in subfolders; {remedy}")


def _repository(name: str) -> str:
    """Return user/name for a cache folder models--user--name."""
    return name.removeprefix(CACHE_PREFIX).replace("--", "/", 1)
