"""Models downloaded from a hub: from a stand-in for its HTTP interface on the loopback, into a cache of the test's."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import qexp
from qexp.errors import ConfigError, DiskError, HubError, LoadError, MissingLibraryError
from qexp.experiments.run import run_experiment
from qexp.hub import download
from qexp.hub.download import HubId, hub_id, local_folder, pinned, pinned_model
from qexp.models.diffusers import DiffusersConfig, Source
from qexp.rerun import stored_config
from qexp.results.run_folder import RunFolder
from qexp.sweep.run_key import run_key
from tests.assigning import run_config
from tests.backends import save_digits
from tests.hub.hub_server import TOKEN, HubServer, client_of, environment, serving
from tests.language import save_language_model
from tests.screen import foreign_lines

WEIGHTS = "model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; what this process remembers of hubs is forgotten."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    download._downloaded.cache_clear()
    return tmp_path / "hub"


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(HubServer()) as one, client_of(one, monkeypatch, token=None):
        yield one


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits(tmp_path_factory.mktemp("digits"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forget() -> None:
    """As a process that starts anew."""
    download._downloaded.cache_clear()


def weights(seed: int) -> bytes:
    return random.Random(seed).randbytes(300_000)


MODEL = {"config.json": b'{"a": 1}', WEIGHTS: weights(0)}


def failure(path: str = "user/toy", **arguments: str) -> str:
    with pytest.raises(HubError) as caught:
        pinned(path, place="model.path", **arguments)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


# Which paths are asked of a hub


@pytest.mark.parametrize(
    "path",
    ["./x/y", "../x/y", "/x", "/x/y", "~/x", "x", "a/b/c", "models/x.gguf", "a/b.safetensors", "a/b c", "-a/b", ""],
)
def test_what_is_no_repositorys_name_is_never_asked_of_a_hub(path: str, server: HubServer) -> None:
    assert hub_id(path) is None
    assert pinned(path, place="model.path") == path and local_folder(path) == Path(path).expanduser()
    assert server.requests == []


def test_what_is_here_is_never_asked_of_a_hub(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user" / "toy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("user/toy") is None and local_folder("user/toy") == Path("user/toy")
    assert hub_id(Path("user/other")) is None  # a Path is one
    assert hub_id("user/other") == HubId("user/other")
    assert hub_id("user/other@refs/pr/3") == HubId("user/other", "refs/pr/3")


# Which files


def test_a_model_is_its_config_its_tokenizer_and_its_safetensors(server: HubServer, cache: Path) -> None:
    others = {
        "model.fp16.safetensors": b"f", "pytorch_model.bin": b"b", "model.ckpt": b"c", "onnx/model.onnx": b"o",
        "README.md": b"r", "original/consolidated.safetensors": b"d", "picture.png": b"p",
        "pytorch_model.bin.index.json": b"i",
    }  # fmt: skip
    wanted = {**MODEL, "tokenizer.json": b"{}", "merges.txt": b"m", "spiece.model": b"s", "chat_template.jinja": b"j"}
    commit = server.add("user/toy", {**others, **wanted})
    assert pinned("user/toy", place="model.path") == f"user/toy@{commit}"
    assert files_of(local_folder(f"user/toy@{commit}")) == wanted
    assert server.count("GET .*resolve") == len(wanted)


def test_of_shards_those_that_the_index_names(server: HubServer) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    wanted = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": weights(1),
        "model-2.safetensors": weights(2),
    }
    server.add("user/toy", {**wanted, "consolidated.safetensors": b"c", "model.safetensors.index.fp16.json": b"{}"})
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == wanted


def test_a_pipeline_is_its_index_and_its_components(server: HubServer) -> None:
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    wanted = {
        "model_index.json": json.dumps(index).encode(),
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": weights(1),
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": weights(2),
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"",
    }
    others = {
        "flux1-dev.safetensors": b"f",
        "ae.safetensors": b"a",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"v",
    }
    server.add("user/toy", {**wanted, **others, "safety_checker/model.safetensors": b"s", "config.json": b"{}"})
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == wanted


@pytest.mark.parametrize("index", ["index.fp16", "fp16.index"])
def test_of_a_variant_the_files_that_components_have_of_it(
    index: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
    stem = "diffusion_pytorch_model"
    shards = {"a": f"{stem}-00001-of-00002.fp16.safetensors", "b": f"{stem}-00002-of-00002.fp16.safetensors"}
    both = {
        "model_index.json": json.dumps({name: ["diffusers", kind] for name, kind in parts.items()}).encode(),
        **{f"{name}/config.json": b"{}" for name in parts},
        f"vae/{stem}.safetensors": weights(0),  # it has no files of the variant
    }
    variant = {
        f"unet/{stem}.safetensors.{index}.json": json.dumps({"weight_map": shards}).encode(),
        **{f"unet/{name}": weights(number) for number, name in enumerate(shards.values(), 1)},
        "text_encoder/model.fp16.safetensors": weights(3),
    }
    plain = {f"unet/{stem}.safetensors": weights(4), "text_encoder/model.safetensors": weights(5)}
    server.add("user/toy", {**both, **variant, **plain})
    model = DiffusersConfig(path="user/toy", variant="fp16", reference_path="user/toy")
    found = pinned(model.path or "", variant="fp16", place="model.path")
    assert files_of(local_folder(found)) == {**both, **variant}
    assert Source(replace(model, path=found)).checkpoints() == {
        "unet": local_folder(found) / "unet" / f"{stem}.safetensors.{index}.json",
        "text_encoder": local_folder(found) / "text_encoder" / "model.fp16.safetensors",
        "vae": local_folder(found) / "vae",
    }
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pinned("user/toy", variant="fp16", place="model.path") == found
    assert "has no files of the variant fp8" in failure(variant="fp8")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    requests = server.count("GET .*resolve")
    with pytest.raises(LoadError, match=r"user/toy: it has no files of the variant fp8, such as .*; leave the variant"):
        pinned("user/toy", variant="fp8", place="model.path")
    assert server.count("GET .*resolve") == requests
    pinned_model(model)
    assert model.unquantized().variant is None  # the reference is as precise as it can be
    assert files_of(local_folder(found)) == {**both, **variant, **plain}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "no safetensors, only 'pytorch_model.bin'; use"),
        ({"config.json": b"{}"}, "it has no safetensors, and no other weights; use"),
        ({"a.gguf": b"", "b.gguf": b""}, r"several .gguf files \('a.gguf', 'b.gguf'\).*hf download user/name file"),
        ({"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""}, r"several safetensors files \('a.safe"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, "names 'b.safetensors', which"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'}, "in the same folder"),
        ({"model.safetensors.index.json": b"[]"}, "must hold a JSON object"),
        ({"model_index.json": b'{"vae": ["diffusers", "AutoencoderKL"]}'}, "names 'vae', but the repository has"),
        (
            {"model_index.json": b'{"vae": ["diffusers", "AutoencoderKL"]}', "vae/x.bin": b""},
            "user/toy, vae: it has no safetensors, only 'x.bin'",
        ),
    ],
)  # fmt: skip
def test_a_repository_that_cannot_be_opened(files: dict[str, bytes], message: str, server: HubServer) -> None:
    server.add("user/toy", files)
    with pytest.raises(LoadError, match=message):
        pinned("user/toy", place="model.path")
    assert server.count(r"GET .*resolve.*(safetensors|gguf|bin)$") == 0  # said before weights are downloaded


def test_the_only_gguf_file_is_the_model(server: HubServer) -> None:
    files = {"config.json": b"{}", "model.gguf": weights(0)}
    server.add("user/toy", files)
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == files


# Revisions, and the cache


def test_revisions(server: HubServer) -> None:
    first = server.add("user/toy", MODEL)
    second = server.add("user/toy", {WEIGHTS: weights(9)})
    server.repositories["user/toy"].branches["dev"] = server.repositories["user/toy"].branches["main"][:2]
    assert pinned("user/toy", place="model.path") == f"user/toy@{second}"
    for revision in ("dev", first):
        assert pinned("user/toy", revision, place="model.path") == f"user/toy@{first}"
        assert pinned(f"user/toy@{revision}", place="model.path") == f"user/toy@{first}"
    assert files_of(local_folder(f"user/toy@{first}")) == MODEL
    assert local_folder("user/toy@dev") == local_folder(f"user/toy@{first}")
    assert "has no revision 'nope' of it; use a branch, a tag or a commit" in failure(revision="nope")
    with pytest.raises(ConfigError, match=r"model\.path=user/toy@dev has a revision already; leave out revision=main"):
        pinned("user/toy@dev", "main", place="model.path")
    with pytest.raises(ConfigError, match=r"model\.path=\./toy is a local path, but revision=a needs a hub's"):
        pinned("./toy", "a", place="model.path")


def test_what_is_there_is_not_downloaded_again(server: HubServer, tmp_path: Path) -> None:
    """Whoever downloaded it: the library's own client finds what we brought, and we what it brought."""
    server.add("user/toy", MODEL)
    commit = pinned("user/toy", place="model.path").partition("@")[2]
    requests = len(server.requests)
    forget()
    assert pinned("user/toy", place="model.path").endswith(commit)
    assert server.requests[requests:] == ["GET /api/models/user/toy/revision/main"]
    file = huggingface_hub.hf_hub_download("user/toy", WEIGHTS)
    assert Path(file) == local_folder("user/toy") / WEIGHTS and server.count("GET .*resolve") == 2

    server.add("user/other", MODEL)
    huggingface_hub.snapshot_download("user/other")
    requests = server.count("GET .*resolve")
    pinned("user/other", place="model.path")
    assert server.count("GET .*resolve") == requests


def test_a_sweep_asks_once(server: HubServer) -> None:
    server.add("user/toy", MODEL)
    assert len({pinned("user/toy", place="model.path") for _ in range(3)}) == 1
    assert server.count("GET /api/models/.*/revision") == 1


def test_the_same_content_of_a_new_commit_is_not_downloaded_again(server: HubServer) -> None:
    server.add("user/toy", MODEL)
    pinned("user/toy", place="model.path")
    server.add("user/toy", {"README.md": b"new", "config.json": b'{"a": 2}'})
    forget()
    folder = local_folder(pinned("user/toy", place="model.path"))
    assert files_of(folder) == {**MODEL, "config.json": b'{"a": 2}'}
    assert server.count(f"GET .*{WEIGHTS}") == 1


def test_offline_what_is_cached_is_used(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("user/toy", MODEL)
    known = pinned("user/toy", place="model.path")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(server.requests)
    for path in ("user/toy", "user/toy@main", known):
        forget()
        assert pinned(path, place="model.path") == known
    message = failure("user/other")
    assert "is not a local file or folder, and HF_HUB_OFFLINE forbids the network" in message
    assert "is not in the cache" in message and "set model.path to a folder" in message
    (local_folder(known) / WEIGHTS).unlink()
    forget()
    assert "its snapshot in the cache is incomplete" in failure()
    assert len(server.requests) == requests


@pytest.mark.parametrize("status", [0, 500, 503])
def test_a_hub_that_does_not_answer(status: int, server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("user/toy", MODEL)
    server.fault = lambda request: status
    message = failure()
    why = f"answered {status}" if status else r"cannot be reached \(\w+: [^;]*\)"
    assert re.fullmatch(
        rf"model\.path=user/toy is not a local file or folder, and {re.escape(server.url)} {why}; revision main of "
        rf"this repository is not in the cache {re.escape(constants.HF_HUB_CACHE)}; set model\.path to a folder "
        r"with the model, HF_ENDPOINT to a reachable hub, or HF_HUB_CACHE to a cache that has it "
        r"\(HF_HUB_OFFLINE=1 then uses no hub\)",
        message,
    )
    assert len(server.requests) == 1
    server.fault = lambda request: None
    known = pinned("user/toy", place="model.path")
    forget()
    server.fault = lambda request: status
    assert pinned("user/toy", place="model.path") == known
    assert re.search("warning: model.path=user/toy: .*; using commit .* from the cache", capsys.readouterr().err)


def test_a_hub_that_is_not_there_fails_within_seconds(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert "http://127.0.0.1:9 cannot be reached (ConnectError" in failure()
    assert time.monotonic() - started < 10  # huggingface_hub's own retries wait 15 s and more


def test_a_repository_that_is_not_there(server: HubServer) -> None:
    message = failure()
    assert f"there is no local file or folder of this name, and {server.url} has no such repository" in message
    assert "set HF_TOKEN" in message


def test_a_gated_repository(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("user/toy", MODEL)
    server.repositories["user/toy"].gated = True
    message = failure()
    assert "it is gated: its licence must be accepted first" in message
    assert f"accept it on {server.url}/user/toy, and set HF_TOKEN" in message
    server.fault = lambda request: 403 if "/resolve/" in request else None
    assert "it is gated" in failure()
    server.fault = lambda request: None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == MODEL


def test_a_token_is_not_sent_to_where_large_files_are(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("user/toy", MODEL)
    server.repositories["user/toy"].gated = server.elsewhere = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == MODEL
    assert server.count("GET /elsewhere/") == 1


# Downloads that break off


def test_a_connection_that_is_lost_is_made_again_where_it_was(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # a part of one is lost
    server.add("user/toy", MODEL)
    server.cut = lambda name: 120_000 if name == WEIGHTS else None
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == MODEL
    assert [first for name, first in server.ranges if name == WEIGHTS] == [0, 100_000, 200_000]


def test_a_download_that_breaks_off_is_not_in_the_cache(server: HubServer, cache: Path) -> None:
    server.add("user/toy", MODEL)
    server.cut = lambda name: 0 if name == WEIGHTS else None
    message = failure()
    assert f"the connection to {server.url} broke off (RemoteProtocolError" in message
    assert message.endswith(download.AGAIN)
    assert not list(cache.rglob(WEIGHTS)) and not list(cache.rglob("*.incomplete"))
    server.cut, server.ranges = lambda name: None, []
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == MODEL
    assert [name for name, _ in server.ranges] == [WEIGHTS]  # config.json was there


def test_a_file_of_another_size_is_thrown_away(server: HubServer, cache: Path) -> None:
    server.add("user/toy", MODEL)
    server.spoil = lambda data: data[:-1]
    message = failure()
    assert "Consistency check failed" in message and message.endswith(download.AGAIN)
    server.spoil = lambda data: data
    assert files_of(local_folder(pinned("user/toy", place="model.path"))) == MODEL


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_hub_that_lists_files_and_does_not_give_them(status: int, server: HubServer) -> None:
    server.add("user/toy", MODEL)
    pinned("user/toy", place="model.path")
    server.add("user/toy", {WEIGHTS: weights(1)})
    forget()
    server.fault = lambda request: status if "/tree/" in request else None
    assert ("it is gated" if status == 403 else f"answered {status}") in failure()


def test_a_snapshot_of_which_a_part_is_there_is_not_taken_for_a_whole(server: HubServer) -> None:
    """The library returns the snapshot as it is when it gets no list of files."""
    server.add("user/toy", MODEL)
    huggingface_hub.hf_hub_download("user/toy", "config.json")
    server.fault = lambda request: 500 if "/tree/" in request else None
    assert f"the download of '{WEIGHTS}' broke off" in failure()


def test_progress_is_shown_in_files_and_bytes(
    server: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("user/toy", MODEL)
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("qexp.system.progress.time.monotonic", lambda: next(clock))
    pinned("user/toy", place="model.path")
    shown = capsys.readouterr().err
    assert re.search(r"user/toy: downloading 1 file, 0.00 GiB, to .*models--user--toy", shown)
    assert re.search(r"user/toy: downloading [01]/1 files, 0.00/0.00 GiB, \d+ s", shown)


# The disk


def test_a_disk_with_too_little_space_is_said_before_weights_are_downloaded(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("user/toy", MODEL)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, download.SPARE_BYTES))
    with pytest.raises(DiskError, match=r"model\.path=user/toy: the download needs .* GiB, .*HF_HUB_CACHE="):
        pinned("user/toy", place="model.path")
    assert server.count(f"GET .*{WEIGHTS}") == 0


@pytest.mark.parametrize("there", [False, True])
def test_content_that_is_in_the_cache_needs_no_space_again(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 1,000 bytes, and a disk with room for 100."""
    free = download.SPARE_BYTES + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))
    (tmp_path / "toy" / "blobs").mkdir(parents=True)
    (tmp_path / "toy" / "blobs" / ("abc" if there else "abc.incomplete")).write_bytes(bytes(1000))
    with nullcontext() if there else pytest.raises(DiskError, match="the download needs"):
        download._check_space(tmp_path / "toy", [download.HubFile(1000, "abc")], "model.path=user/toy")


def test_a_disk_that_becomes_full(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("user/toy", MODEL)
    monkeypatch.setattr(
        "huggingface_hub.file_download.http_get",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(DiskError, match=r"No space left on device\); free space there, .* HF_HUB_CACHE="):
        pinned("user/toy", place="model.path")


def test_a_cache_that_cannot_be_written(server: HubServer, cache: Path) -> None:
    server.add("user/toy", MODEL)
    cache.write_text("a file")
    with pytest.raises(DiskError, match=r"HF_HUB_CACHE="):
        pinned("user/toy", place="model.path")


def test_names_that_lead_out_of_the_cache_are_refused(server: HubServer) -> None:
    server.add("user/toy", {**MODEL, "../../evil.json": b"{}"})
    assert "which is invalid" in failure()


def test_no_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingLibraryError, match=r"model\.path=user/toy needs huggingface_hub .*pip install"):
        pinned("user/toy", place="model.path")


# In experiments, and from Python


def test_the_key_is_that_of_the_content_wherever_and_whenever_it_was_downloaded(
    digits: Path, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("user/digits", files_of(digits))
    config = run_config("model.path=user/digits", "device=cpu")
    assert re.fullmatch("user/digits@[0-9a-f]{40}", config.model.path) and config.model.revision is None
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    forget()
    key = run_key(run_config("model.path=user/digits", "model.revision=main", "device=cpu"))
    assert run_key(run_config("model.path=user/digits", "device=cpu")) == key
    server.add("user/digits", {"README.md": b"new"})
    forget()
    assert run_key(run_config("model.path=user/digits", "device=cpu")) == key
    server.add("user/digits", {WEIGHTS: files_of(digits)[WEIGHTS][:-1] + b"\1"})
    forget()
    assert run_key(run_config("model.path=user/digits", "device=cpu")) != key


def test_a_reference_may_be_on_a_hub(digits: Path, server: HubServer, tmp_path: Path) -> None:
    qexp.save(qexp.load(digits, "packed_uint4", device="cpu"), tmp_path / "saved")
    commit = server.add("user/digits", files_of(digits))
    config = run_config(f"model.path={tmp_path / 'saved'}", "model.reference_path=user/digits@main", "task=roundtrip")
    assert config.model.reference_path == f"user/digits@{commit}"
    (tmp_path / "run").mkdir()
    assert run_experiment(config, tmp_path / "run")["roundtrip/sqnr_db_mean"] is not None


def test_a_revision_without_a_repository_is_refused(server: HubServer, digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.revision=a needs a hub's repository; set model\.path=user/name"):
        run_config("model.revision=a")
    with pytest.raises(ConfigError, match=r"model\.path=/.* is a local path, but revision=a .*leave the rev"):
        run_config(f"model.path={digits}", "model.revision=a")


def test_other_mistakes_are_said_before_anything_is_downloaded(server: HubServer) -> None:
    with pytest.raises(ConfigError, match=r"components\.nope"):
        run_config("model.path=user/digits", "+components.nope.compute_dtype=bf16")
    assert server.requests == []


def test_load_by_name(server: HubServer, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "model")
    commit = server.add("user/llama", files_of(folder))
    server.add("user/llama", {WEIGHTS: b"damaged"})
    model = qexp.load("user/llama", "packed_uint4", revision=commit, device="cpu")
    expected = qexp.load(folder, "packed_uint4", device="cpu")
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    with pytest.raises(ConfigError, match="revision=a is of a hub's repository"):
        qexp.load(folder, revision="a")
    with pytest.raises(HubError, match="source=user/none: there is no local file or folder of this name"):
        qexp.load("user/none")


def test_a_run_from_a_hub_and_its_stored_configuration(
    digits: Path, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user does: parent and worker are processes of their own, and only the parent asks the hub."""
    commit = server.add("user/digits", files_of(digits))
    variables = {**os.environ, **environment(server, None), "HF_HUB_CACHE": str(tmp_path / "hub")}
    small = ["device=cpu", "tracking=none", "task=roundtrip", "backend=packed_uint4"]
    command = [sys.executable, "-m", "qexp", "model.path=user/digits", *small]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "user/digits: downloading 1 file, " in done.stderr and "done in" in done.stdout + done.stderr
    assert foreign_lines(done.stdout + done.stderr) == []
    assert server.count("GET /api/models/.*/revision") == 1 and server.count("GET .*resolve") == 2
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert f"path: user/digits@{commit}" in (run / "config.yaml").read_text()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run_key(stored_config(RunFolder(run), None)) == run.name
    shutil.rmtree(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget()
    assert run_key(stored_config(RunFolder(run), None)) == run.name  # downloaded again
    assert server.count("GET .*resolve") == 4
