"""Files and folders that are often put where a checkpoint belongs, told by their first bytes, and the remedy of each.

A download that went wrong leaves a pointer of git-lfs, a web page or nothing; older weights are pickles, which run code
when they are opened, and are never opened here; and a hub's cache has its models two folders further down.
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
    """Raise WrongFileError for a file that is known to be neither a checkpoint nor JSON; rewind the stream.

    A file that is not known is left to its own reader.
    """
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise WrongFileError(f"'{file}' is empty (0 bytes): a download that did not begin; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WrongFileError(
            f"'{file}' is a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder, or download it "
            "again with `hf download user/name`"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<!--")):
        raise WrongFileError(
            f"'{file}' is a web page, not a checkpoint's file: the address was that of a page, or needed a login; "
            "download it again with `hf download user/name`"
        )
    if _is_pickle(head):
        raise WrongFileError(
            f"'{file}' is a pickle of PyTorch or a zip archive, not safetensors; {convert_remedy([file])}"
        )


def refuse_other_format(file: Path, stream: BufferedReader, *, wants_gguf: bool) -> None:
    """Raises WrongFileError for a file in the one format that is named as the other."""
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
    """Of any protocol since 2, or in a zip. The first eight bytes of safetensors are a length, which may look so."""
    is_protocol = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return head[8:9] != b"{" and (is_protocol or head.startswith(b"PK\x03\x04"))


def convert_remedy(files: Sequence[Path]) -> str:
    """The command that makes safetensors of one pickle, the first, or of all shards of one model."""
    files = [file for file in files if "-of-" in file.name] or files[:1]
    target = files[0].with_suffix(".safetensors") if len(files) == 1 else files[0].parent / "model.safetensors"
    names = " ".join(shlex.quote(str(file)) for file in (target, *files))
    return f'convert it, if you trust it: python -c "{CONVERT}" {names}'


def pickles_in(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files of a folder that are pickles by their names; training leaves small ones, which hold no weights."""
    no_weights = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
    return [folder / name for name in sorted(names) if name.endswith(PICKLE_SUFFIXES) and name not in no_weights]


def refuse_cache_folder(folder: Path) -> None:
    """Raises WrongFileError for a folder of a hub's cache that is above the snapshots of models."""
    names = sorted(os.listdir(folder)) if folder.is_dir() and os.access(folder, os.R_OK) else []
    if any(name in names for name in REAL_FILES) or any(name.endswith((".safetensors", ".gguf")) for name in names):
        return
    repositories = [_repository(name) for name in names if name.startswith(CACHE_PREFIX)]
    if repositories:
        raise WrongFileError(
            f"'{folder}' is a hub's cache of {len(repositories)} models; set model.path to one of them by its name: "
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
    raise WrongFileError(f"'{folder}' is a repository's folder in a hub's cache, above the model itself; {remedy}")


def _repository(name: str) -> str:
    """user/name of a folder of the cache, models--user--name."""
    return name.removeprefix(CACHE_PREFIX).replace("--", "/", 1)
