"""Tensors and models to disk, whole or not at all."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qexp.errors import ConfigError, DiskError
from qexp.loading import saving
from qexp.loading.saving import save_model, save_tensors
from tests.assigning import run_config
from tests.loading.toys import Toy, load_toy, random_state, save_state, settings


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond this, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {
        "images": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "transposed": torch.arange(6).view(2, 3).t(),
        "part": torch.arange(10)[::2],
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    path = tmp_path / "new folder" / "outputs.safetensors"
    save_tensors(path, tensors)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, name
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [entry.name for entry in path.parent.iterdir()] == ["outputs.safetensors"]


def test_a_disk_that_is_full_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "outputs.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    with files_of_at_most(50_000), pytest.raises(DiskError) as caught:
        save_tensors(path, {"a": torch.zeros(100_000)})
    assert str(path) in str(caught.value) and os.strerror(errno.EFBIG) in str(caught.value)
    assert "paths.outputs" in str(caught.value)
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["outputs.safetensors"]


def test_a_full_disk_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving, "write_safetensors", fail)
    with pytest.raises(DiskError, match=r"No space left on device.*free space there"):
        save_tensors(tmp_path / "outputs.safetensors", {"a": torch.ones(3)})


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"file/outputs\.safetensors"):
        save_tensors(tmp_path / "file" / "outputs.safetensors", {"a": torch.ones(3)})


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'b' is complex128, which safetensors files do not have; cast it"):
        save_tensors(tmp_path / "outputs.safetensors", {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {
        name: torch.arange(3, dtype=dtype) for name, dtype in (("b", torch.int8), ("a\t\u00e9\x7f", torch.float64))
    }
    metadata = {f'{number} \u00fc \x01\n"': f'{{"{number}": "\\u00e9 \u20ac/\x7f"}}' for number in range(40)}
    for number in range(4):
        save_tensors(tmp_path / f"{number}.safetensors", tensors, metadata)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", **metadata}
        assert all(opened.get_tensor(name).tolist() == [0, 1, 2] for name in tensors)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_numbered_from_one_as_diffusers_does(tmp_path: Path) -> None:
    model = load_toy(save_state(tmp_path / "dense", random_state(Toy)), settings("none")).model
    files = save_model(model, tmp_path / "saved", max_shard_bytes=200_000)
    shards = sorted(file.name for file in files if file.suffix == ".safetensors")
    assert len(shards) == 11
    assert shards == [f"diffusion_pytorch_model-{number:05}-of-00011.safetensors" for number in range(1, 12)]


@pytest.mark.parametrize("backend", ["torchao", "gguf"])
def test_a_failed_save_keeps_the_model_that_was_there(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_toy(save_state(tmp_path / "dense", random_state(Toy)), settings(backend)).model
    save_model(model, tmp_path / "saved", max_shard_bytes=200_000)
    before = content(tmp_path / "saved")
    with files_of_at_most(50_000), pytest.raises(DiskError, match=r"saved: .*another folder with save\.path="):
        save_model(model, tmp_path / "saved")
    assert content(tmp_path / "saved") == before
    monkeypatch.setattr(saving, "_write_config", lambda *_: 1 / 0)  # the very last file
    with pytest.raises(ZeroDivisionError):
        save_model(model, tmp_path / "saved")
    assert content(tmp_path / "saved") == before


def test_saving_twice_gives_the_same_files(tmp_path: Path) -> None:
    model = load_toy(save_state(tmp_path / "dense", random_state(Toy)), settings("torchao")).model
    for name in ("one", "two", "three"):
        save_model(model, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


@pytest.mark.parametrize("backend", ["none", "torchao", "gguf"])
def test_a_model_is_not_saved_over_its_own_checkpoint(backend: str, tmp_path: Path) -> None:
    dense = save_state(tmp_path / "dense", random_state(Toy))
    before, model = content(dense), load_toy(dense, settings(backend)).model
    (tmp_path / "link").symlink_to(dense)
    for place in (dense, tmp_path / "link", dense / ".." / "dense"):
        with pytest.raises(ConfigError, match=r"save: .*contains the checkpoint .*choose another folder"):
            save_model(model, place)
    assert content(dense) == before
    save_model(model, tmp_path / "saved")
    if backend != "gguf":  # which needs a skeleton for its own
        with pytest.raises(ConfigError, match="choose another folder"):
            save_model(load_toy(tmp_path / "saved", settings("none")).model, tmp_path / "saved")


def test_a_place_that_holds_the_models_checkpoint_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    dense = save_state(tmp_path / "dense", random_state(Toy))
    source = f"model.path={dense}"
    for arguments in (
        (source, f"save.path={dense}"),
        (source, f"save.path={tmp_path}/./dense/"),
        (f"model.path={next(dense.glob('*.safetensors'))}", f"save.path={dense}"),
        (f"model.reference_path={dense}", f"save.path={dense}"),
    ):
        with pytest.raises(ConfigError, match=r"save\.path=.*contains the checkpoint .*choose another folder"):
            run_config("device=cpu", *arguments)
    assert run_config("device=cpu", source, f"save.path={tmp_path}/saved").save.path == f"{tmp_path}/saved"
