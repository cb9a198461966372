"""Weights that were quantized before: the same bytes, never those of anything else, never half an entry."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qexp.config.backend_options import backend_of
from qexp.config.schema import ComponentConfig
from qexp.loading import cache_key, quantized_cache
from qexp.loading.component import CacheFolder, LoadedComponent
from qexp.loading.quantized_cache import ENTRY, WEIGHTS, QuantizedCache
from qexp.quantizers import torchao
from tests.backends import EVERY_WAY_TO_QUANTIZE, same_bytes
from tests.loading.test_mapping import all_leaves
from tests.loading.toys import Toy, answer_of, load_toy, random_state, save_state, settings

MIB = 1 << 20
NO_GIB = 1e-9


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_state(tmp_path / "dense", random_state(Toy))


@pytest.fixture
def cache(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "kept")


def load(
    dense: Path, cache: CacheFolder | None, backend: Any = "bitsandbytes", build: Any = Toy, **fields: Any
) -> LoadedComponent:
    chosen = settings(backend, **{"compute_dtype": "bfloat16", **fields}) if isinstance(backend, str) else backend
    return load_toy(dense, chosen, build, cache=cache)


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """What `load` gives of `dense` without a cache."""
    return load(save_state(tmp_path_factory.mktemp("dense"), random_state(Toy)), None).model


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


def same_models(one: nn.Module, other: nn.Module) -> bool:
    a, b = all_leaves(one), all_leaves(other)
    return a.keys() == b.keys() and all(same_bytes(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_second_load_has_the_bits_of_the_first_and_of_one_without(
    backend: str, dense: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    without, miss, hit = (load(dense, own, backend) for own in (None, cache, cache))
    assert [without.cached, miss.cached, hit.cached] == [None, False, True]
    assert same_models(miss.model, without.model) and same_models(hit.model, without.model)
    assert torch.equal(answer_of(hit.model), answer_of(without.model))
    assert torch.equal(answer_of(miss.model), answer_of(without.model))
    assert miss.plan.skipped == hit.plan.skipped == without.plan.skipped
    assert miss.plan.quantized_nbytes == hit.plan.quantized_nbytes == without.plan.quantized_nbytes
    assert hit.times == miss.times and hit.memory.peak_anon_bytes == miss.memory.peak_anon_bytes
    assert len(entries(tmp_path / "kept")) == 1


def test_hit_reads_no_weight_that_is_quantized(
    dense: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, cache, "torchao")
    monkeypatch.setattr(torchao, "row_slices", lambda *_: pytest.fail("quantized again"))
    assert load(dense, cache, "torchao").cached


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "another backend": lambda folder: {"backend": "quanto"},
    "another dtype": lambda folder: {"compute_dtype": "float16"},
    "another skip list": lambda folder: {"skip_modules": ("head",)},
    "fp32": lambda folder: {"keep_in_fp32_modules": ("head",)},
    "other weights": lambda folder: change_one_weight(folder),
}


def change_one_weight(folder: Path) -> dict[str, Any]:
    state = load_file(folder / "model.safetensors")
    state["blocks.0.fc1.weight"][0, 0] += 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return {}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_bytes_is_in_the_key(change: str, dense: Path, cache: CacheFolder, tmp_path: Path) -> None:
    load(dense, cache)
    fields = CHANGES[change](dense)
    other = load(dense, cache, **fields)
    assert other.cached is False
    assert same_models(other.model, load(dense, None, **fields).model)
    assert len(entries(tmp_path / "kept")) == 2


def test_copy_of_the_checkpoint_and_another_number_of_workers_are_the_same_weights(
    dense: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    load(dense, cache)
    shutil.copytree(dense, tmp_path / "copy")
    assert load(tmp_path / "copy", cache).cached


def test_version_of_a_library_and_source_code_are_in_the_key(
    dense: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, cache)
    versions = cache_key.versions_of
    monkeypatch.setattr(cache_key, "versions_of", lambda names: {**versions(names), "bitsandbytes": "99"})
    assert load(dense, cache).cached is False
    monkeypatch.undo()
    monkeypatch.setattr(cache_key, "_code_digest", lambda: "edited")
    assert load(dense, cache).cached is False
    monkeypatch.undo()
    assert load(dense, cache).cached is True


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (entry / WEIGHTS).write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte": flip_a_byte,
    "cut": lambda entry: os.truncate(entry / WEIGHTS, 1000),
    "no weights": lambda entry: (entry / WEIGHTS).unlink(),
    "no description": lambda entry: (entry / ENTRY).unlink(),
    "not json": lambda entry: (entry / ENTRY).write_text("{"),
    "a list": lambda entry: (entry / ENTRY).write_text("[]"),
    "other fields": lambda entry: (entry / ENTRY).write_text("{}"),
    "empty": lambda entry: list(map(Path.unlink, entry.iterdir())),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_made_again(
    damage: str,
    dense: Path,
    cache: CacheFolder,
    uncached: nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load(dense, cache)  # and let go: a file that is cut while it is mapped ends the process
    DAMAGE[damage](entries(tmp_path / "kept")[0])
    again = load(dense, cache)
    assert again.cached is False and same_models(again.model, uncached)
    assert "is damaged" in capsys.readouterr().err
    assert load(dense, cache).cached is True


def test_entry_that_was_copied_is_compared_and_used(dense: Path, cache: CacheFolder, tmp_path: Path) -> None:
    load(dense, cache)
    shutil.copytree(tmp_path / "kept", tmp_path / "moved")
    assert load(dense, CacheFolder(tmp_path / "moved")).cached is True


def test_least_recently_used_goes_first(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    load(dense, CacheFolder(folder))
    nbytes = sum(path.stat().st_size for path in entries(folder)[0].iterdir())
    cache = CacheFolder(folder, 2.5 * nbytes / 2**30)
    old = entries(folder)[0]
    os.utime(old / ENTRY, (1, 1))
    load(dense, cache, skip_modules=("head",))
    (second,) = set(entries(folder)) - {old}
    assert load(dense, cache).cached is True  # used now
    os.utime(second / ENTRY, (2, 2))
    load(dense, cache, skip_modules=("embed",))
    assert old in entries(folder) and second not in entries(folder)
    assert len(entries(folder)) == 2


def test_what_is_no_entry_is_left_alone(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    for own in (folder / "runs", folder / ("0" * 32)):
        own.mkdir(parents=True)
        (own / "model.safetensors").write_bytes(bytes(1000))
    load(dense, CacheFolder(folder))
    (new,) = (path for path in entries(folder) if (path / ENTRY).exists())
    nbytes = sum(path.stat().st_size for path in new.iterdir())
    load(dense, CacheFolder(folder, 1.5 * nbytes / 2**30), skip_modules=("head",))
    assert not new.exists()
    assert (folder / "runs/model.safetensors").exists() and (folder / ("0" * 32) / "model.safetensors").exists()


def test_entry_that_cannot_be_read_now_is_not_removed(
    dense: Path, cache: CacheFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(dense, cache)
    (entry,) = entries(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(quantized_cache, "read_json", lambda path: (_ for _ in ()).throw(PermissionError(13, "no", path)))
        load(dense, cache)
    assert "cannot be read" in capsys.readouterr().err and entry.exists()
    assert load(dense, cache).cached is True


def test_limit_that_is_too_small_is_said_once_and_nothing_is_kept(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = CacheFolder(tmp_path / "kept", NO_GIB)
    for _ in range(2):
        assert load(dense, cache).cached is False
    said = [line for line in capsys.readouterr().err.splitlines() if "are not kept" in line]
    assert len(said) == 1 and "loader.cache_gib allows 0.00" in said[0]
    assert entries(tmp_path / "kept") == []


def test_full_disk_means_no_entry_and_is_said_once(
    dense: Path,
    cache: CacheFolder,
    uncached: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.loading.test_saving import files_of_at_most

    with files_of_at_most(10_000):
        for _ in range(2):
            loaded = load(dense, cache)
            assert loaded.cached is False and same_models(loaded.model, uncached)
    said = [line for line in capsys.readouterr().err.splitlines() if "are not kept" in line]
    assert len(said) == 1 and "File too large" in said[0]
    assert entries(tmp_path / "kept") == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(quantized_cache.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert load(dense, CacheFolder(tmp_path / "other", 1.0)).cached is False
    assert "the disk has 0.00 left" in capsys.readouterr().err


def test_default_limit_is_a_tenth_of_the_free_disk(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, CacheFolder(tmp_path / "kept"))
    nbytes = sum(path.stat().st_size for path in entries(tmp_path / "kept")[0].iterdir())
    monkeypatch.setattr(quantized_cache, "SPARE_BYTES", 0)
    usage = shutil.disk_usage(tmp_path)
    for share, fits in ((9, False), (11, True)):
        free = share * nbytes
        monkeypatch.setattr(quantized_cache.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        folder = tmp_path / f"of {share}"
        load(dense, CacheFolder(folder))
        assert len(entries(folder)) == fits


@pytest.mark.exhaustive
def test_two_processes_at_once_leave_one_whole_entry(dense: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.loading.test_quantized_cache import CacheFolder, load
dense, folder = map(Path, sys.argv[1:])
load(dense, CacheFolder(folder))
assert load(dense, CacheFolder(folder)).cached is True
"""
    command = [sys.executable, "-c", code, str(dense), str(tmp_path / "kept")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    (entry,) = entries(tmp_path / "kept")
    assert sorted(path.name for path in entry.iterdir()) == [ENTRY, WEIGHTS]
    assert load(dense, CacheFolder(tmp_path / "kept")).cached is True


def test_what_a_killed_process_left_is_removed(dense: Path, tmp_path: Path) -> None:
    left = tmp_path / "kept" / f"{quantized_cache.UNFINISHED}999999999-x"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    load(dense, CacheFolder(tmp_path / "kept"))
    assert not left.exists() and len(entries(tmp_path / "kept")) == 1


def test_entry_that_vanishes_during_the_load_is_made_again(
    dense: Path, cache: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(dense, cache)
    find = QuantizedCache.find

    def evicted(self: QuantizedCache, prepared: Any) -> Any:
        found = find(self, prepared)
        assert found is not None
        quantized_cache.discard(found.folder)
        return found

    monkeypatch.setattr(QuantizedCache, "find", evicted)
    again = load(dense, cache)
    assert again.cached is False and same_models(again.model, expected.model)


@pytest.mark.parametrize("backend", ["none", "calibrated"])
def test_what_has_no_stored_form_is_loaded_without(
    backend: str, dense: Path, cache: CacheFolder, tmp_path: Path
) -> None:
    if backend == "none":
        assert load(dense, cache, backend).cached is None
        return
    chosen = settings("quanto", "activations_dtype=int8", compute_dtype="bfloat16")
    for _ in range(2):
        assert load(dense, cache, chosen).cached is False
    assert entries(tmp_path / "kept") == []


def test_mixed_formats_are_kept_too(dense: Path, cache: CacheFolder) -> None:
    rules = [
        {"modules": ["embed"], "backend": "gguf_q4_0"},
        {"modules": ["**.fc1"], "backend": "bitsandbytes"},
        {"modules": ["**.fc2"], "backend": "torchao"},
        {"backend": "none"},
    ]
    chosen = ComponentConfig(backend_of("mixed", {"recipe": rules}).resolved("cpu"), compute_dtype="bfloat16")
    models = [load(dense, own, chosen) for own in (None, cache, cache)]
    assert [each.cached for each in models] == [None, False, True]
    assert all(same_models(each.model, models[0].model) for each in models)


@pytest.mark.exhaustive
@pytest.mark.own_process
def test_memory_of_a_hit_and_a_miss_agree(tmp_path: Path) -> None:
    state = {f"layers.{number}.weight": torch.zeros(2048, 2048, dtype=torch.bfloat16) for number in range(8)}
    code = """
import sys
from pathlib import Path
from tests.loading.test_quantized_cache import *
from qexp.system.memory import host_memory, release_freed_memory
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(8))
loaded = load(Path(sys.argv[1]), CacheFolder(Path(sys.argv[2]), in_child=True), sys.argv[3], Wide)
with torch.no_grad():
    for layer in loaded.model.layers:
        layer(torch.zeros(1, 2048, dtype=torch.bfloat16))
release_freed_memory()  # of the forward's own tensors, which glibc keeps or does not
print(loaded.cached, host_memory().total_bytes - loaded.memory.baseline.total_bytes, loaded.memory.peak_bytes)
"""
    dense = save_state(tmp_path / "dense", state)
    for backend in ("torchao", "bitsandbytes"):
        command = [sys.executable, "-c", code, str(dense), str(tmp_path / "kept"), backend]
        miss, hit = (subprocess.check_output(command, text=True).split() for _ in range(2))
        assert (miss[0], hit[0]) == ("False", "True")
        assert abs(int(miss[1]) - int(hit[1])) < 2 * MIB, (backend, miss, hit)
        assert miss[2] == hit[2]


def test_entry_says_what_its_load_took(dense: Path, tmp_path: Path) -> None:
    loaded = load(dense, CacheFolder(tmp_path / "kept"))
    numbers = json.loads((entries(tmp_path / "kept")[0] / ENTRY).read_text())["numbers"]
    assert numbers["read"] == loaded.times.read > 0 and numbers["plan"] == loaded.times.plan
    assert numbers["peak_bytes"] == loaded.memory.peak_bytes
