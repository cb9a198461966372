"""Checkpoints with made weights, of published architectures at full size or of fewer blocks, without any download.

    python scripts/make_checkpoint.py --list
    python scripts/make_checkpoint.py flux_dev/transformer /path/to/folder                  # 23.8 GB in 3 files
    python scripts/make_checkpoint.py flux_dev/transformer /path/to/folder --fraction 0.1   # a tenth of the blocks
    python scripts/make_checkpoint.py flux_dev /path/to/folder                              # every component

The files are those that the model's authors published: names of tensors, dtype, shards and their index, config.json;
of a whole pipeline also model_index.json and the scheduler's config, but no tokenizers. The weights are independent
draws from 65,536 equally likely quantiles of N(0, 0.02²), scales of norms from those of N(1, 0.02²), and what a network
computes itself (position embeddings) is written as it is: a forward stays finite. The same name, seed and dtype give
the same bytes.

In memory are only the slices being drawn, some 30 MiB for each core. The folder appears when it is complete; how much
disk it needs is said first, and it is refused if that is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp.checkpoints.safetensors_file import make_header
from qexp.errors import ConfigError, DiskError, QexpError
from qexp.models import architectures
from qexp.system.progress import Progress

STD = 0.02
SLICE_WEIGHTS = 4 << 20  # drawn at a time
SPARE_BYTES = 1 << 30  # of the disk, left free
BLOCK_COUNTS = ("num_layers", "num_single_layers", "num_hidden_layers")  # fields of config.json that count blocks


class Layout:
    """The files of one component, decided before anything is written: which tensors, where, in which dtype.

    shards: files of about equal size, or if that is null, files of at most `max_shard_gb` · 10^9 bytes, split as
    diffusers and transformers split them.
    """

    def __init__(self, config: Mapping[str, Any], dtype: str, max_shard_gb: float, shards: int | None = None) -> None:
        self.config, self.dtype, self.itemsize = config, dtype, getattr(torch, dtype).itemsize
        model = architectures.network(config)
        self.tensors = architectures.stored_tensors(model)
        self.scales = _scale_names(model, self.tensors)
        sizes = {name: tensor.numel() * self.itemsize for name, tensor in self.tensors.items()}
        self.nbytes = sum(sizes.values())
        self.stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
        parts = list(_split(sizes, max_shard_gb * 1e9) if shards is None else _equal_parts(sizes, shards))
        self.files = {self._file_name(number, len(parts)): names for number, names in enumerate(parts, 1)}

    def _file_name(self, number: int, count: int) -> str:
        suffix = f"-{number:05}-of-{count:05}" if count > 1 else ""
        return f"{self.stem}{suffix}.safetensors"

    def write(self, folder: Path, title: str, seed: int = 0, workers: int | None = None) -> None:
        """config.json, the weights, and their index if there are several files."""
        folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(title, "writing {} tensors", len(self.tensors), self.nbytes)
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as threads:
            for file, names in self.files.items():
                self._write_file(folder / file, names, seed, threads, progress)
        progress.close()
        if len(self.files) > 1:
            weight_map = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / f"{self.stem}.safetensors.index.json", index)
        _write_json(folder / "config.json", self.config)

    def _write_file(
        self, file: Path, names: Sequence[str], seed: int, threads: ThreadPoolExecutor, progress: Progress
    ) -> None:
        """One safetensors file, its tensors drawn by all threads and written where they belong."""
        dtype = architectures.SAFETENSORS_NAMES[self.dtype]
        header = make_header(
            {name: (dtype, self.tensors[name].shape, self.itemsize) for name in names}, {"format": "pt"}
        )
        end, offsets = len(header), dict[str, int]()
        for name in names:
            offsets[name], end = end, end + self.tensors[name].numel() * self.itemsize
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, end)
            _pwrite(descriptor, header, 0)
            for name in names:
                count = self.tensors[name].numel()
                write = partial(self._write_slice, descriptor, name, offsets[name], seed)
                list(threads.map(write, range(0, count, SLICE_WEIGHTS)))
                progress.advance(count * self.itemsize)
            os.fsync(descriptor)
        except OSError as error:
            raise DiskError(f"'{file}' cannot be written: {error.strerror}; make room, or use another disk") from error
        finally:
            os.close(descriptor)

    def _write_slice(self, descriptor: int, name: str, offset: int, seed: int, start: int) -> None:
        """Draw, or copy, the weights of a tensor from `start` on, at most SLICE_WEIGHTS of them, and write them."""
        tensor = self.tensors[name]
        count = min(SLICE_WEIGHTS, tensor.numel() - start)
        if tensor.is_meta:
            codes = _codes((seed, zlib.crc32(name.encode()), start), count)
            drawn = _quantiles(self.dtype, 1.0 if name in self.scales else 0.0)[codes]
        else:
            own = tensor.detach().flatten()[start : start + count].to(getattr(torch, self.dtype))
            drawn = own.view(torch.uint8).numpy()
        _pwrite(descriptor, memoryview(drawn).cast("B"), offset + start * self.itemsize)


def write_checkpoint(folder: Path, config: Mapping[str, Any], shards: int) -> None:
    """A component with made weights in bf16, in files of about equal size.

    Raises: ConfigError if the folder exists, DiskError if the disk has no room for it.
    """
    layout = Layout(config, "bfloat16", 10, shards)
    check_disk(folder, layout.nbytes)
    with complete_or_not_at_all(folder) as unfinished:
        layout.write(unfinished, folder.name)


def write_architecture(
    folder: Path,
    what: str,
    *,
    fraction: float = 1.0,
    dtype: str | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """MODEL/COMPONENT, or all of MODEL, in the published layout. dtype: null is that of the published files.

    Raises: ConfigError for a wrong name or fraction or if the folder exists, DiskError if the disk has no room for it.
    """
    name, _, part = what.partition("/")
    model = architectures.architecture(name)
    components = {part: architectures.component_of(name, part)} if part else dict(model.components)
    layouts = {
        place: Layout(shortened(found.config, fraction), dtype or found.dtype, found.max_shard_gb)
        for place, found in components.items()
    }
    check_disk(folder, sum(layout.nbytes for layout in layouts.values()))
    with complete_or_not_at_all(folder) as unfinished:
        for place, layout in layouts.items():
            layout.write(unfinished if part else unfinished / place, place, seed, workers)
        if not part:
            _write_json(unfinished / "scheduler" / "scheduler_config.json", model.scheduler)
            _write_json(unfinished / "model_index.json", model.model_index)


@contextmanager
def complete_or_not_at_all(folder: Path) -> Iterator[Path]:
    """Provide a folder that takes the name of `folder` at the end of the block, if nothing was raised in it."""
    if folder.exists():
        raise ConfigError(f"'{folder}' exists; remove it, or choose another folder")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_disk(folder: Path, nbytes: int) -> None:
    """Says how much disk is needed. Raises DiskError if that is not there."""
    existing = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    print(f"{folder}: {nbytes / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free", file=sys.stderr)
    if nbytes + SPARE_BYTES > free:
        raise DiskError(
            f"'{folder}' needs {nbytes / 1e9:.1f} GB and {SPARE_BYTES / 1e9:.1f} GB to spare, but its disk has "
            f"{free / 1e9:.1f} GB free; make room, choose another disk, or write fewer blocks with --fraction"
        )


def _split(sizes: Mapping[str, int], limit: float) -> Iterator[list[str]]:
    """The names of each file, as the libraries' `save_pretrained` fills them: a file ends where the next tensor would
    not fit."""
    part, total = list[str](), 0
    for name, size in sizes.items():
        if part and total + size > limit:
            yield part
            part, total = [], 0
        part.append(name)
        total += size
    yield part


def _equal_parts(sizes: Mapping[str, int], count: int) -> Iterator[list[str]]:
    limit, part, total = sum(sizes.values()) / count, list[str](), 0
    for name, size in sizes.items():
        part.append(name)
        total += size
        if total >= limit:
            yield part
            part, total = [], 0
    if part:
        yield part


def _scale_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the tensors that norms multiply with."""
    owned = {
        id(parameter): name == "weight" or name == "gamma"
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
    }
    return {name for name, tensor in tensors.items() if owned.get(id(tensor), False)}


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view) > 0:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _codes(seed: tuple[int, ...], count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Uniform 16-bit numbers, four from each 64-bit draw."""
    generator = np.random.Generator(np.random.SFC64(seed))
    return generator.integers(0, 2**64, -(-count // 4), dtype=np.uint64).view(np.uint16)[:count]


@cache
def _quantiles(dtype: str, mean: float) -> np.ndarray[Any, Any]:
    """Return the bits of 65,536 equally likely values of N(mean, STD²), as whole numbers of the dtype's size."""
    levels = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values = (mean + STD * torch.special.ndtri(levels)).to(getattr(torch, dtype))
    return values.view(torch.int32 if values.itemsize == 4 else torch.int16).numpy()


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def shortened(config: Mapping[str, Any], fraction: float) -> dict[str, Any]:
    """Return the config of a network with that fraction of the blocks, one of each kind at least."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"--fraction {fraction} must be above 0, and 1 at most")
    counted = [name for name in BLOCK_COUNTS if name in config]
    return {**config, **{name: max(1, round(config[name] * fraction)) for name in counted}}


def describe() -> str:
    """Return a line for each component of each architecture."""
    lines = []
    for name in architectures.architecture_names():
        for part, component in architectures.architecture(name).components.items():
            nbytes = component.parameters * getattr(torch, component.dtype).itemsize
            size = f"{component.parameters / 1e9:6.2f} B parameters, {nbytes / 1e9:5.1f} GB in {component.dtype}"
            lines.append(f"{f'{name}/{part}':28} {size}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="MODEL for a whole pipeline, or MODEL/COMPONENT")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--list", action="store_true", help="the architectures and their sizes")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the blocks of each network")
    parser.add_argument(
        "--dtype", choices=tuple(architectures.SAFETENSORS_NAMES), help="default: that of the published files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="threads that draw; default: one a core")
    arguments = parser.parse_args()
    if arguments.list:
        print(describe())
        return
    if arguments.folder is None:
        parser.error("name what to write and where; --list shows what there is")
    options = {name: getattr(arguments, name) for name in ("fraction", "dtype", "seed", "workers")}
    try:
        write_architecture(arguments.folder, arguments.what, **options)
    except QexpError as error:
        raise SystemExit(str(error)) from None
    print(f"wrote {arguments.folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
