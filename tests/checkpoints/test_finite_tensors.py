"""A file that is mapped is searched for infinities and NaN once, and again when it has changed."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qexp
from qexp.checkpoints import file_facts
from qexp.checkpoints.finite_tensors import FiniteTensors
from qexp.checkpoints.regular_file import FileState
from qexp.checkpoints.safetensors_file import write_safetensors
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.loading import weights

WIDTH = 800  # two layers of 1.2 MiB


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
        self.register_buffer("mask", torch.empty(16))


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the tensors that are searched from now on; facts are kept in a folder of this test's own."""
    names: list[str] = []
    check = weights.check_finite
    monkeypatch.setattr(weights, "check_finite", lambda name, tensor: (names.append(name), check(name, tensor))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_facts, "FRESH_NS", 0)
    return names


def save(folder: Path, value: float = 1.0) -> Path:
    state = {f"{layer}.weight": torch.full((WIDTH, WIDTH), 1.0, dtype=torch.bfloat16) for layer in range(2)}
    state["1.weight"][-1, -1] = value
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", {**state, "mask": torch.full((16,), -torch.inf)}, {})
    return folder


def load(folder: Path, **options: object) -> nn.Module:
    return qexp.load(folder, skeleton=Net, device="cpu", **options)  # type: ignore[arg-type]


def test_a_mapped_file_is_searched_once(tmp_path: Path, searched: list[str]) -> None:
    folder = save(tmp_path / "model")
    load(folder)
    assert sorted(searched) == ["0.weight", "1.weight"]
    model = load(folder)
    assert len(searched) == 2
    assert model(torch.ones(1, WIDTH, dtype=torch.bfloat16)).isfinite().all()


def test_a_file_that_has_changed_is_searched_again(tmp_path: Path, searched: list[str]) -> None:
    folder = save(tmp_path / "model")
    load(folder)
    save(folder, torch.nan)
    with pytest.raises(LoadError, match=r"'1\.weight' is not finite in bfloat16"):
        load(folder)
    with pytest.raises(LoadError, match=r"'1\.weight' is not finite in bfloat16"):
        load(folder)  # what was refused is not known as finite


def test_a_file_written_just_now_is_searched_again(
    tmp_path: Path, searched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load(save(tmp_path / "model"))
    assert not (tmp_path / "cache").exists()


def test_a_load_that_skips_some_tensors_keeps_what_others_found(tmp_path: Path, searched: list[str]) -> None:
    folder = save(tmp_path / "model")
    load(folder, backend="torchao", skip_modules=["0"], compute_dtype="bfloat16")
    assert searched == ["0.weight"]  # the other one is quantized, which reads it anyway
    load(folder)
    assert searched == ["0.weight", "1.weight"]
    load(folder)
    assert len(searched) == 2


def test_what_is_read_is_searched_each_time(tmp_path: Path, searched: list[str]) -> None:
    folder = save(tmp_path / "model")
    for count in (2, 4):
        load(folder, map=False)
        assert len(searched) == count


def test_damaged_facts_are_found_again(tmp_path: Path, searched: list[str]) -> None:
    folder = save(tmp_path / "model")
    load(folder)
    (fact,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "finite" in path.parts]
    for text in ("", "{", '{"a": 1}', "[null]", "é"):
        fact.write_text(text, encoding="utf-8")
        searched.clear()
        load(folder)
        assert len(searched) == 2, text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path, searched: list[str]) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    load(save(tmp_path / "model"))


def test_a_part_of_a_tensor_does_not_stand_for_all_of_it(tmp_path: Path) -> None:
    """A conversion may cut a tensor, and map its first rows."""
    state = FileState(1, 2, 2 << 20, 0, 0)
    whole = TensorEntry("a", "F32", (8,), tmp_path, 64, 32, state=state)
    finite = FiniteTensors()
    finite._known[state] = {(64, 80)}
    assert whole not in finite
    assert replace(whole, shape=(4,), nbytes=16) in finite
