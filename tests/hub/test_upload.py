"""Models pushed to a hub: by huggingface_hub's own client, to a stand-in for its HTTP interface on the loopback."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.config.schema import SaveConfig
from qexp.errors import ConfigError, HubError, MissingLibraryError
from qexp.experiments.reference import reference_config
from qexp.experiments.run import run_experiment
from qexp.hub import upload
from qexp.loading.saving import save_model
from qexp.rerun import stored_config
from qexp.results.run_folder import RunFolder, Status, now_iso
from qexp.sweep.resume import SCORED_FILES, Decision, decide
from qexp.sweep.run_key import run_key
from tests.assigning import run_config
from tests.backends import CPU, save_digits
from tests.hub.hub_server import PART_BYTES, TOKEN, HubServer, Repository, client_of, environment, serving
from tests.loading.toys import Toy, load_toy, random_state, save_state, settings

NAME = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SAVE = SaveConfig(push_to_hub="tester/toy")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(HubServer()) as one, client_of(one, monkeypatch):
        yield one


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three shards of one tensor each, the second of which is sent in parts."""
    tensors = {name: torch.full((100 * (number + 1),), number) for number, name in enumerate(SHARDS)}
    tensors[SHARDS[1]] = torch.arange(PART_BYTES // 8 * 2 + 3)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(zip(SHARDS, SHARDS, strict=True))}))
    (folder / "config.json").write_text('{"width": 3}')
    return folder


def push(model: Path, save: SaveConfig = SAVE) -> dict[str, Any]:
    return upload.push(model, [model / name for name in [INDEX, *SHARDS, "config.json"]], save, "Upload toy in int8")


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_config_comes_first_and_then_all_the_weights_at_once(server: HubServer, model: Path) -> None:
    pushed = push(model)
    commits = server.repositories["tester/toy"].branches["main"]
    assert [commit.title for commit in commits[1:]] == [
        "Upload toy in int8: configuration",
        "Upload toy in int8: weights",
    ]
    assert list(commits[1].files) == ["config.json"]
    assert commits[2].files == on_disk(model)
    assert commits[2].lfs == set(SHARDS)
    assert pushed == {
        "repo_id": "tester/toy",
        "revision": None,
        "commit": commits[2].sha,
        "url": f"{server.url}/tester/toy/commit/{commits[2].sha}",
    }
    assert server.count("PUT /upload/.*/3$") == 1  # the large one went in three parts
    first_weights = next(n for n, request in enumerate(server.requests) if "/upload/" in request)
    assert any("/commit/" in request for request in server.requests[:first_weights])


def test_a_download_is_the_model(server: HubServer, model: Path, tmp_path: Path) -> None:
    push(model)
    folder = Path(huggingface_hub.snapshot_download("tester/toy", local_dir=tmp_path / "downloaded"))
    assert on_disk(folder) == on_disk(model)
    assert set(open_checkpoint(folder).entries) == set(SHARDS)


@pytest.mark.parametrize(("private", "visibility"), [(None, None), (True, "private"), (False, "public")])
def test_private(private: bool | None, visibility: str | None, server: HubServer, model: Path) -> None:
    push(model, SaveConfig(push_to_hub="tester/toy", private=private))
    assert server.repositories["tester/toy"].visibility == visibility


def test_revision_and_commit_message(server: HubServer, model: Path) -> None:
    push(model, SaveConfig(push_to_hub="tester/toy", revision="int8", commit_message="Try int8"))
    assert server.titles("tester/toy", "int8")[1:] == ["Try int8: configuration", "Try int8: weights"]
    assert server.files("tester/toy", "int8") == on_disk(model) and server.files("tester/toy") == {}
    assert push(model, SaveConfig(push_to_hub="tester/toy", revision="int8"))["revision"] == "int8"  # there already


def test_pushing_again_sends_nothing(server: HubServer, model: Path) -> None:
    first, sent = push(model), server.count("PUT /upload/")
    assert push(model) == first
    assert server.count("PUT /upload/") == sent > 0
    assert len(server.titles("tester/toy")) == 3


def test_what_an_earlier_push_left_of_another_model_is_removed(server: HubServer, model: Path, tmp_path: Path) -> None:
    push(model)
    other = save_state(tmp_path / "other", {"a": torch.zeros(2)})
    (other / "model.safetensors").rename(other / NAME)
    commits = server.repositories["tester/toy"].branches["main"]
    own = {"README.md": b"mine", "diffusion_pytorch_model.fp16.safetensors": b"", "sub/" + SHARDS[0]: b""}
    commits[-1].files.update(own)
    upload.push(other, [other / "config.json", other / NAME], SAVE, "Upload")
    assert server.files("tester/toy") == on_disk(other) | own


def test_a_gitignore_in_the_repository_keeps_nothing_out(server: HubServer, model: Path) -> None:
    server.repositories["tester/toy"] = Repository()
    server.repositories["tester/toy"].branches["main"][0].files[".gitignore"] = b"*.safetensors *.json"
    push(model)
    assert set(server.files("tester/toy")) == {".gitignore", *on_disk(model)}


def failure(model: Path, save: SaveConfig = SAVE) -> str:
    with pytest.raises(HubError) as caught:
        push(model, save)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_token_that_may_not_write_there(server: HubServer, model: Path) -> None:
    message = failure(model, SaveConfig(push_to_hub="google/toy"))
    assert message.startswith("save.push_to_hub=google/toy: this token may not write to 'google' (You don't have the")
    assert message.endswith("or push to a repository of your own; nothing was uploaded")


def test_a_token_that_is_wrong(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    message = failure(model)
    assert "does not accept the token (Invalid credentials in Authorization header); set HF_TOKEN to" in message
    assert message.endswith("nothing was uploaded")


def test_a_repository_that_is_gone(server: HubServer, model: Path) -> None:
    server.fault = lambda request: 404 if "/preupload/" in request else None
    assert f"{server.url} does not have it, or hides it from this token" in failure(model)


@pytest.mark.parametrize("status", [0, 500, 503], ids=["hangs up", "500", "503"])
def test_an_upload_that_breaks_off_says_what_arrived_and_goes_on_there(
    status: int, server: HubServer, model: Path
) -> None:
    third = "PUT /upload/" + hashlib.sha256((model / SHARDS[2]).read_bytes()).hexdigest()
    server.fault = lambda request: status if request == third else None
    message = failure(model)
    arrived = f"in the repository: config.json; stored for the next try: {INDEX}, {SHARDS[0]}, {SHARDS[1]}; "
    assert arrived + upload.AGAIN in message
    assert ("broke off (" if status == 0 else f"answered {status} (") in message
    assert list(server.files("tester/toy")) == ["config.json"]
    server.fault, sent = lambda request: None, server.count("PUT /upload/")
    push(model)
    assert server.files("tester/toy") == on_disk(model)
    assert server.count("PUT /upload/") == sent + 1  # the third alone


def test_a_hub_that_is_not_there(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = failure(model, SaveConfig(path=str(model), push_to_hub="tester/toy"))
    assert "the upload to http://127.0.0.1:9 broke off (ConnectError: " in message
    assert message.endswith(f"check the network; nothing was uploaded; the model is in {model}")


# What is known before a model is loaded


@pytest.mark.parametrize(
    "name", ["toy", "a/b/c", "tester/", "/toy", "tester/to y", "tester/toy..a", "tester/-toy", "é/a"]
)
def test_a_name_that_is_none_is_refused_before_the_run(name: str, server: HubServer) -> None:
    with pytest.raises(ConfigError, match=r"save\.push_to_hub=.* user/name"):
        run_config(f"save.push_to_hub='{name}'")
    assert server.requests == []


def test_no_token_is_said_before_the_run(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=rf"needs a token of {server.url}, .*set HF_TOKEN .*`hf auth login`"):
        run_config("save.push_to_hub=tester/toy")
    assert server.requests == []


def test_no_network_wanted_is_said_before_the_run(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE forbids the network; unset it, or use save\.path"):
        run_config("save.push_to_hub=tester/toy")


def test_no_library_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingLibraryError, match=r"needs huggingface_hub .*pip install huggingface_hub"):
        run_config("save.push_to_hub=tester/toy")


def test_settings_that_need_each_other(server: HubServer) -> None:
    assert run_config("save.push_to_hub=tester/toy", "save.private=true").save.private is True
    for name, value in {"private": "true", "revision": "a", "commit_message": "b"}.items():
        with pytest.raises(ConfigError, match=rf"save\.{name}=.* set save\.push_to_hub=user/name, too"):
            run_config(f"save.{name}={value}")
    with pytest.raises(ConfigError, match=r"save\.revision must not be empty"):
        run_config("save.push_to_hub=tester/toy", "save.revision=''")
    with pytest.raises(ConfigError, match=r"save\.push_to_hub=tester/toy with task=roundtrip"):
        run_config("task=roundtrip", "save.push_to_hub=tester/toy")


# A saved model that is in the way


def test_saving_over_a_sharded_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    loaded = load_toy(save_state(tmp_path / "dense", random_state(Toy)), settings("torchao")).model
    many = save_model(loaded, tmp_path / "saved", max_shard_bytes=200_000)
    assert many[0].name == "config.json" and INDEX in {path.name for path in many} and len(many) > 4
    few = save_model(loaded, tmp_path / "saved")
    assert {path.name for path in few} == {"config.json", NAME} == set(on_disk(tmp_path / "saved"))
    again = load_toy(tmp_path / "saved", settings("none")).model
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), loaded(x)) and x.device == CPU


# Experiments


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits(tmp_path_factory.mktemp("digits"))


SMALL = ("device=cpu", "tracking=none", "task.num_images=2", "task.num_inference_steps=1", "backend=packed_uint4")
PUSH = ("save.push_to_hub=tester/digits", "save.max_shard_gib=0.0002")


def qexp(
    folder: Path, server: HubServer, *arguments: str, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qexp", *SMALL, "isolation=inline", "metrics.names=[psnr_db]", *arguments]
    variables = {**os.environ, **environment(server, token)}
    variables = {name: value for name, value in variables.items() if name != "HF_TOKEN" or token is not None}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.exhaustive
def test_a_run_is_pushed_downloaded_and_loaded_with_no_quantization_argument(
    digits: Path, tmp_path: Path, server: HubServer
) -> None:
    done = qexp(tmp_path, server, f"model.path={digits}", *PUSH)
    assert done.returncode == 0, done.stdout + done.stderr
    files = server.files("tester/digits")
    assert sum(name.endswith(".safetensors") for name in files) > 1 and INDEX in files
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "qexp_packed"
    assert server.titles("tester/digits")[1] == "Upload digits in qexp_packed uint4wo: configuration"
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert json.loads((run / "hub.json").read_text())["repo_id"] == "tester/digits"
    assert not list(run.glob(".save*"))  # the model is on the hub alone
    assert TOKEN not in "".join(path.read_text() for path in run.glob("*.[jy]*"))

    downloaded = huggingface_hub.snapshot_download("tester/digits", local_dir=tmp_path / "downloaded")
    config = run_config(*SMALL[:-1], f"model.path={downloaded}")
    assert config.components["transformer"].backend.quant_method == "qexp_packed"
    (tmp_path / "again").mkdir()
    run_experiment(config, tmp_path / "again")
    one, other = (load_file(folder / "outputs.safetensors")["images"] for folder in (run, tmp_path / "again"))
    assert torch.equal(one, other)


def test_a_gguf_file_is_pushed_and_takes_the_place_of_safetensors(
    digits: Path, tmp_path: Path, server: HubServer
) -> None:
    for name in ("packed_uint4", "gguf"):
        (tmp_path / name).mkdir()
        run_experiment(run_config(*SMALL[:-1], *PUSH, f"backend={name}", f"model.path={digits}"), tmp_path / name)
    names = set(server.files("tester/digits"))
    assert len(names) == 2 and "config.json" in names and any(name.endswith(".gguf") for name in names)
    downloaded = huggingface_hub.snapshot_download("tester/digits", local_dir=tmp_path / "downloaded")
    (tmp_path / "again").mkdir()
    run_experiment(run_config(*SMALL[:-1], f"model.path={downloaded}"), tmp_path / "again")
    images = [load_file(tmp_path / name / "outputs.safetensors")["images"] for name in ("gguf", "again")]
    assert torch.equal(*images)


def test_a_run_without_a_token_stops_at_once(tmp_path: Path, server: HubServer) -> None:
    refused = qexp(tmp_path, server, *PUSH, token=None)
    assert refused.returncode == 1 and "needs a token" in refused.stderr and not (tmp_path / "outputs").exists()
    assert server.requests == []


def test_with_a_path_the_model_is_kept_when_the_upload_fails(digits: Path, tmp_path: Path, server: HubServer) -> None:
    server.fault = lambda request: 500 if request.startswith("PUT /upload/") else None
    config = run_config(*SMALL, *PUSH, f"model.path={digits}", f"save.path={tmp_path / 'saved'}")
    (tmp_path / "run").mkdir()
    with pytest.raises(HubError, match=rf"answered 500 .*the model is in {tmp_path / 'saved'}"):
        run_experiment(config, tmp_path / "run")
    assert len(open_checkpoint(tmp_path / "saved").files) > 1 and not list((tmp_path / "run").glob("hub.json"))


def test_a_finished_run_runs_again_to_be_pushed_and_then_is_kept(
    digits: Path, tmp_path: Path, server: HubServer
) -> None:
    done = run_config(*SMALL, f"model.path={digits}", "metrics.names=[]")
    folder = RunFolder(tmp_path)
    folder.write_status(Status("done", os.getpid(), now_iso()))
    folder.write_json("result.json", {"env": {}})
    for name in SCORED_FILES:
        folder.write_text(name, "")
    assert decide(done, folder).action == "keep"
    pushing = replace(done, save=SaveConfig(push_to_hub="tester/digits"))
    assert run_key(pushing) == run_key(done)
    assert decide(pushing, folder) == Decision("run", "its model is to be pushed to tester/digits")
    folder.write_json("hub.json", {"repo_id": "tester/digits", "revision": None})
    assert decide(pushing, folder).action == "keep"
    other_branch = replace(done, save=SaveConfig(push_to_hub="tester/digits", revision="int8"))
    assert decide(other_branch, folder).action == "run"
    assert reference_config(pushing).save == SaveConfig()


def test_running_again_to_compare_publishes_nothing(digits: Path, tmp_path: Path, server: HubServer) -> None:
    config = run_config(*SMALL, *PUSH, f"model.path={digits}", f"save.path={tmp_path / 'saved'}")
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_container()))
    save = stored_config(RunFolder(tmp_path), tmp_path / "outputs").save
    assert save == SaveConfig(path=str(tmp_path / "saved"), max_shard_gib=0.0002)
    container = {**config.to_container(), "save": {"push_to_hub": "tester/digits", "layout": "file"}}
    (tmp_path / "config.yaml").write_text(json.dumps(container))
    assert stored_config(RunFolder(tmp_path), tmp_path / "outputs").save == SaveConfig()  # what was pushed alone
