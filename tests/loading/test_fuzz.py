"""More than a thousand damaged checkpoints, of every format that can be stored: each is refused, clearly, at once."""

import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qexp.errors import ConfigError, LoadError
from qexp.loading.saving import save_model
from qexp.quantizers.base import load_quantizer
from tests.backends import QUANTIZING, REPRESENTATIVES, backend_config
from tests.loading import damage, damage_folders, damage_tensors
from tests.loading.damage import Damage, Files, all_tensors, is_inner
from tests.loading.damage_tensors import SHAPES
from tests.loading.toys import load_toy, random_state, save_state, settings
from tests.products import representatives

QUANTIZERS = {name: load_quantizer(backend_config(name)) for name in QUANTIZING}
STORABLE = [
    name
    for name, one in QUANTIZERS.items()
    if one.is_serializable and one.file_format == "safetensors" and not name.startswith("torchao")
]
KINDS: list[Damage] = [*damage.KINDS, *damage_tensors.KINDS, *damage_folders.KINDS]
ROUNDS = 1 + 1500 // (len(KINDS) * (len(STORABLE) + 1))  # of every kind of damage on every format
CASES = 2 * len(KINDS) * ROUNDS // 3  # at least, on each: not every format has everything to damage
SECONDS, ADDRESS_SPACE_BYTES = 5, 1 << 30  # that one load may take, or take more
REMEDIES = r"download|set |use |repair|convert|check|keep one|put it|put the|install|load it|restore"


class Net(nn.Module):
    """Two layers to quantize, one that is left alone, a norm and a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 3)
        self.register_buffer("steps", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))))


@contextmanager
def within(seconds: int, nbytes: int) -> Iterator[None]:
    """A load that hangs is interrupted, and one that reserves much more memory than there is in use fails."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still loading after {seconds} s")

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + nbytes, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def saved(tmp_path: Path, backend: str) -> list[Files]:
    """A checkpoint in one file, and in several."""
    assert {f"{name}.weight": tuple(getattr(Net(), name).weight.shape) for name in ("first", "second")} == SHAPES
    dense = save_state(tmp_path / "dense", random_state(Net))
    model = load_toy(dense, settings(backend, skip_modules=() if backend == "none" else ("head",)), Net).model
    save_model(model, tmp_path / "whole")
    save_model(model, tmp_path / "shards", max_shard_bytes=9000)
    return [read(tmp_path / "whole"), read(tmp_path / "shards")]


def clear(message: str) -> bool:
    """One line with a place and a remedy."""
    place = re.search(r"'[^']*(first|second|norm|head|steps|damaged)[^']*'|quantization_config|checkpoint", message)
    return "\n" not in message and len(message) < 1200 and bool(place) and bool(re.search(REMEDIES, message))


def descriptions(files: Files) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the headers say of the tensors of quantized weights."""
    found = all_tensors(files)
    return {
        name: (one["dtype"], tuple(one["shape"])) for name, (_, one) in found.items()
        if is_inner(name, files) and not name.endswith("weight_format") and "quant_state" not in name
    }  # fmt: skip


def agrees(model: nn.Module, folder: Path, good: Files, files: Files) -> bool:
    """Whether what was loaded is what the files say, quantized weights in the layout that they had."""
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored.update(load_file(path))
    plain = {name: tensor for name, tensor in model.state_dict().items() if type(tensor) is Tensor and name in stored}
    plain = {name: tensor for name, tensor in plain.items() if tensor.is_floating_point()}
    same = all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in plain.items())
    return same and descriptions(files) == descriptions(good)


def damaged(good: list[Files], backend: str) -> Iterator[tuple[str, str, Files, Files]]:
    """(case, what a load may do, the good files, the damaged ones); seeded, one kind of damage after the other."""
    for number, change in enumerate(KINDS * ROUNDS):
        random = Random(f"{backend} {number}")
        for origin in good if number // len(KINDS) % 2 else good[::-1]:  # the other one has more to damage at times
            files = dict(origin)
            allowed = change(files, random)
            if allowed is not None and files != origin:
                yield f"{number} {change.__name__}", allowed, origin, files
                break


@pytest.mark.parametrize(
    "backend", representatives(["none", *STORABLE], [name for name in REPRESENTATIVES if name in ("none", *STORABLE)])
)
def test_damaged_checkpoints_are_refused_or_loaded_as_they_say(backend: str, tmp_path: Path) -> None:
    good, wrong, refused, cases = saved(tmp_path, backend), [], 0, 0
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    expected = load_toy(write(tmp_path / "damaged", good[1]), settings("none"), Net).model(x)
    for case, allowed, origin, files in damaged(good, backend):
        folder, cases = write(tmp_path / "damaged", files), cases + 1
        try:
            with within(SECONDS, ADDRESS_SPACE_BYTES):
                model = load_toy(folder, settings("none"), Net, workers=1).model
                answer = model(x)
        except (LoadError, ConfigError) as error:
            refused += 1
            wrong += [] if clear(str(error)) else [f"{case}: unclear: {error}"]
        except Exception as error:  # whatever else it is, it is not for users
            wrong.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if allowed == "refused":
                wrong.append(f"{case}: loaded")
            elif not torch.equal(answer, expected) and not agrees(model, folder, origin, files):
                wrong.append(f"{case}: silently something else")
    assert not wrong, f"{len(wrong)} of {cases}:\n" + "\n".join(wrong)
    assert cases > CASES and refused > cases // 2


def test_there_are_more_than_a_thousand_of_them() -> None:
    assert CASES * (len(STORABLE) + 1) > 1000


def test_a_load_that_hangs_or_takes_much_memory_would_be_seen() -> None:
    with pytest.raises(TimeoutError, match="still loading after 1 s"), within(1, ADDRESS_SPACE_BYTES):
        time.sleep(3)
    with pytest.raises(RuntimeError, match="can't allocate memory"), within(1, ADDRESS_SPACE_BYTES):
        torch.empty(2 * ADDRESS_SPACE_BYTES, dtype=torch.uint8)
