"""The recommended model in files: its bytes there, held against the budget."""

import shutil
from pathlib import Path

import pytest

import qexp
from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.fit.__main__ import main
from qexp.fit.opened import find_save_folder, open_model
from qexp.fit.request import read_request
from qexp.fit.saved import bytes_of_layers
from tests.fit.test_proof import QUICK, proof_of

# bytes that files hold for a weight of 256 x 1024: codes, and what each block, group or row needs to read them
ROWS, COLUMNS = 256, 1024
NUMBERS = ROWS * COLUMNS
IN_FILES = {
    "none": 2 * NUMBERS,
    "gguf_q4_0": NUMBERS // 32 * 18,
    "packed_uint3": NUMBERS * 3 // 8 + NUMBERS // 64 * 4,
    "bitsandbytes": NUMBERS // 2 + NUMBERS // 64 * 4 + 16 * 4 + 81,  # absmax, the table of codes, the state as text
    "bitsandbytes_int8": NUMBERS + ROWS * 4 + 1,
    "torchao": NUMBERS + ROWS * (4 + 1),  # scale, zero point
    "quanto": NUMBERS + ROWS * 2 + 2 * 2,  # scale of rows, of input and output
}


@pytest.mark.parametrize(
    "backend", ["none", "gguf_q4_0", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in [*IN_FILES][2:])]
)
def test_bytes_of_layers_are_those_of_their_weights_in_the_file(backend: str, tmp_path: Path) -> None:
    model = qexp.load("digits", backend, device="cpu")
    qexp.save(model, tmp_path / "saved")
    layers = [f"blocks.{number}.mlp.fc2" for number in range(4)]
    assert bytes_of_layers(open_checkpoint(tmp_path / "saved"), layers) == len(layers) * IN_FILES[backend]


@pytest.mark.exhaustive
def test_recommended_model_is_saved_and_its_files_keep_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=digits", "task.num_images=4", "task.num_inference_steps=4", "seeds=1", "score=exact", *QUICK]
    place = tmp_path / "model"
    words = [*words, f"paths.outputs={tmp_path}", f"save.path={place}"]
    assert main([*words, "bits=4.5"]) == 0
    rows, fit, folder = proof_of(tmp_path)
    assert (folder / "saved.json").exists() and "saved: " in capsys.readouterr().out
    recommended = fit["recommended"]
    assert isinstance(recommended, dict)
    loaded = int(rows[recommended["name"]]["weights_bytes"])
    assert qexp.memory_footprint(qexp.load(str(place), device="cpu")) == loaded
    # GGUF files hold as fp32 what is loaded as bf16: what fits as loaded alone is not what is recommended in the end
    shutil.rmtree(place)
    shutil.rmtree(tmp_path / "fit")
    bound = 2_852_872  # bytes of Q4_0 as loaded
    assert main([*words, f"weights={bound}B"]) == 0
    assert "choosing again" in capsys.readouterr().out
    assert open_checkpoint(place).nbytes <= bound


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["save.max_shard_gib=1"], "add save.path="),
        (["save.path=x", "save.layout=file"], "use weights= instead of bits="),
        (["save.path=/proc/x"], "or choose another folder with save.path="),
        (["save.path=x", "--plan"], "with --plan no weight is read"),
    ],
)
def test_saving_that_cannot_be_checked_is_refused_before_the_proof(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model=digits", "bits=4.5", *words]) == 1
    assert why in capsys.readouterr().err


def test_folder_to_save_to_is_that_of_the_run() -> None:
    request = read_request(["model=digits", "bits=4.5", "save.path='~/x'"])
    with open_model(request) as opened:
        assert find_save_folder(opened, request) == Path.home() / "x"
