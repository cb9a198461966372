"""What is put where a checkpoint belongs is told by its first bytes, and the message says what to do about it."""

import pickle
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.foreign_files import CONVERT, convert_remedy, refuse_cache_folder
from qexp.errors import LoadError
from qexp.hub.download import hub_id, local_folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
LEGACY, ZIPPED = {"_use_new_zipfile_serialization": False}, {"_use_new_zipfile_serialization": True}


def weights() -> dict[str, torch.Tensor]:
    shared = torch.arange(12.0).reshape(3, 4)
    return {"embed.weight": shared, "head.weight": shared, "turned": torch.arange(6.0).reshape(2, 3).t()}


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty \(0 bytes\).*download it again"),
        (POINTER, "is a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page.*hf download"),
        (b"\n\n  <HTML lang=en>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (pickle.dumps({"a": 1}, protocol=2), "is a PyTorch pickle.*safetensors.torch"),
        (pickle.dumps([1.5], protocol=5), "is a PyTorch pickle"),
        (b"PK\x03\x04" + bytes(30), "is a PyTorch pickle or a zip archive"),
    ],
)
def test_foreign_content_is_named_with_its_remedy(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "config.json":
        save_file(weights() | {"head.weight": torch.ones(1), "turned": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=f"'{tmp_path / name}' {words}" if words.startswith("is") else words):
        open_checkpoint(tmp_path / name if name != "config.json" else tmp_path)


@pytest.mark.parametrize(("held", "name"), [("safetensors", "a.gguf"), ("gguf", "a.safetensors")])
def test_file_in_the_other_format_is_to_be_renamed(held: str, name: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / name)
    if held == "gguf":
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LoadError, match=f"(?i)holds {held}, not .*; rename it to 'a.{held}'"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("protocol", [0x0280, 0x0480])
def test_safetensors_whose_length_looks_like_a_pickle_are_read(protocol: int, tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    content = protocol.to_bytes(8, "little") + header.ljust(protocol) + b"ab"
    (tmp_path / "a.safetensors").write_bytes(content)
    assert open_checkpoint(tmp_path / "a.safetensors").entries["x"].shape == (2,)


@pytest.mark.parametrize("options", [LEGACY, ZIPPED], ids=["legacy", "zipped"])
@pytest.mark.parametrize("name", ["m.pt", "it's.bin", "a b.ckpt", "m.pth", "ü $x.pkl"])
def test_command_of_the_message_converts_a_pickle(
    name: str, options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": weights(), "epoch": 3} if name == "a b.ckpt" else weights(), tmp_path / name, **options)
    with pytest.raises(LoadError) as caught:
        open_checkpoint(tmp_path / name)
    command = shlex.split(str(caught.value).partition("if you trust it: ")[2])
    assert command[:3] == ["python", "-c", CONVERT]
    monkeypatch.setattr(sys, "argv", command[2:])
    exec(CONVERT, {})
    found = load_file((tmp_path / name).with_suffix(".safetensors"))
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in weights().items())


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (["pytorch_model.bin", "training_args.bin"], "{0}/pytorch_model.safetensors {0}/pytorch_model.bin"),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "optimizer.pt"],
            "{0}/model.safetensors {0}/pytorch_model-00001-of-00002.bin {0}/pytorch_model-00002-of-00002.bin",
        ),
        (["diffusion_pytorch_model.bin"], "{0}/diffusion_pytorch_model.safetensors {0}/diffusion_pytorch_model.bin"),
    ],
)
def test_folder_with_pickles_alone_says_how_to_convert_them(names: list[str], command: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        torch.save({}, tmp_path / name)
    with pytest.raises(LoadError, match="has only pickle files") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).endswith(command.format(tmp_path))


def test_several_pickles_that_are_no_shards_are_converted_one_by_one() -> None:
    assert convert_remedy([Path("a.ckpt"), Path("b.ckpt")]).endswith("a.safetensors a.ckpt")


def snapshot(cache: Path, repository: str, commit: str = "abc") -> Path:
    folder = cache / repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("opened", [open_checkpoint, local_folder])
@pytest.mark.parametrize(
    ("below", "remedy"),
    [
        ("", "hub's cache of 1 models; set model.path to the name of one: 'user/some-name'"),
        ("models--user--some-name", r"set model.path to user/some-name or '.*/snapshots/abc'"),
        ("models--user--some-name/snapshots", r"set model.path to user/some-name or '.*/snapshots/abc'"),
    ],
)
def test_folder_of_a_hubs_cache_names_the_snapshot(opened: Any, below: str, remedy: str, tmp_path: Path) -> None:
    snapshot(tmp_path, "models--user--some-name")
    with pytest.raises(LoadError, match=remedy):
        opened(tmp_path / below)


def test_copied_repository_folder_names_every_snapshot(tmp_path: Path) -> None:
    for commit in ("abc", "def"):
        snapshot(tmp_path, "mine", commit)
    with pytest.raises(LoadError, match=r"set model.path to '.*snapshots/abc' or '.*snapshots/def'"):
        refuse_cache_folder(tmp_path / "mine")


def test_repository_without_a_snapshot_is_to_be_downloaded(tmp_path: Path) -> None:
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with pytest.raises(LoadError, match="it has no snapshot: download the model again"):
        refuse_cache_folder(tmp_path / "models--a--b")


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "model.safetensors", "model.gguf"])
def test_model_with_a_folder_called_snapshots_is_a_model(name: str, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / name).touch()
    refuse_cache_folder(tmp_path)


@pytest.mark.parametrize("path", ["models/x.bin", "x/y.pt", "runs/last.ckpt", "a/b.pth"])
def test_path_of_a_pickle_is_no_repository(path: str) -> None:
    assert hub_id(path) is None
