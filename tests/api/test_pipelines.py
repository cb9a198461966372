"""Pipelines through the configuration and the command line: what is resolved, refused, run, scored and saved."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import qexp
import qexp.sweep.job
from qexp.errors import ConfigError, QexpError
from qexp.sweep.run_key import reference_key, run_key
from tests.assigning import run_config
from tests.composing import command_line
from tests.products import representatives

ROOT = Path(__file__).parents[2]
Folder = Callable[[str], Path]
QUICK = ("task.height=32", "task.width=32", "task.num_inference_steps=2", "task.max_sequence_length=16")


def config(folder: Path, *overrides: str) -> Any:
    return run_config("device=cpu", "model=diffusers", f"model.path={folder}", "task.prompt=a cube", *overrides)


def backends(folder: Path, *overrides: str) -> dict[str, str]:
    components = config(folder, *overrides).components
    return {name: component.backend.quant_method for name, component in components.items()}


def test_the_denoiser_is_quantized_unless_something_else_is_said(pipeline_folder: Folder) -> None:
    flux = {"text_encoder": "none", "text_encoder_2": "none", "transformer": "bitsandbytes", "vae": "none"}
    assert backends(pipeline_folder("flux")) == flux
    assert backends(pipeline_folder("sdxl"))["unet"] == "bitsandbytes"
    wan = backends(pipeline_folder("wan"))
    assert wan["transformer"] == wan["transformer_2"] == "bitsandbytes" and wan["text_encoder"] == "none"
    other = backends(pipeline_folder("flux"), "model.quantize=[text_encoder_2]")
    assert other == flux | {"transformer": "none", "text_encoder_2": "bitsandbytes"}
    own = backends(pipeline_folder("flux"), "+backend@components.text_encoder_2.backend=quanto")
    assert own == flux | {"text_encoder_2": "quanto"}


def test_patterns_are_for_what_is_quantized(pipeline_folder: Folder) -> None:
    own = ("+backend@components.text_encoder_2.backend=quanto", "+components.vae.compute_dtype=fp32")
    found = config(pipeline_folder("flux"), "skip_modules=[proj_out]", "compute_dtype=bf16", *own).components
    assert found["transformer"].skip_modules == found["text_encoder_2"].skip_modules == ("proj_out",)
    assert found["vae"].skip_modules == found["text_encoder"].skip_modules == ()
    assert (found["vae"].compute_dtype, found["text_encoder"].compute_dtype) == ("float32", "bfloat16")


REFUSED = {
    ("model.quantize=[transfomer]",): r"model\.quantize: 'transfomer' is not a component .*did you mean transformer",
    ("+components.text_encoder_3.compute_dtype=fp32",): r"components\.text_encoder_3 is not a component of this model",
    ("+model.checkpoints.tranformer=x.gguf",): r"model\.checkpoints\.tranformer is not a component .*did you mean",
    ("task.prompt=null",): r"task\.prompt=null, but a pipeline needs prompts; give a text or a list",
    ("model.path=null",): r"model\.path=null, but this model needs a pipeline",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_what_is_refused_while_composing(overrides: tuple[str, ...], pipeline_folder: Folder) -> None:
    with pytest.raises(QexpError, match=REFUSED[overrides]):
        config(pipeline_folder("flux"), *overrides)


def test_the_key_is_of_what_changes_the_result(pipeline_folder: Folder) -> None:
    folder = pipeline_folder("flux")
    base = config(folder, *QUICK)
    same = config(folder, *QUICK, "model.quantize=[transformer]")
    assert run_key(base) == run_key(same)
    for change in ("task.height=64", "task.negative_prompt=blur", "+task.pipeline_arguments.eta=1", "seed=1"):
        assert run_key(config(folder, *QUICK, change)) != run_key(base)
    assert reference_key(base) == reference_key(config(folder, *QUICK, "backend=torchao", "model.quantize=[vae]"))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qexp", *arguments, "tracking=none", "device=cpu"],
        cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def result_in(folder: Path) -> tuple[dict[str, Any], Path]:
    (path,) = folder.glob("outputs/runs/*/result.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result, path.parent


def test_a_run_from_the_command_line(pipeline_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized, offloaded, compared, saved; the reference is the unquantized pipeline."""
    run_job = qexp.sweep.job.run_job
    with command_line(monkeypatch, tmp_path) as main:  # in this process, which has the libraries
        monkeypatch.setattr(qexp.sweep.job, "run_job", run_job)
        code = main(
            "model=diffusers", f"model.path={pipeline_folder('flux')}", "task.prompt=[a red cube,two trees]", *QUICK,
            "backend=torchao", "offload=model", "offload.to=disk", "save.path=saved", "reference.offload=block",
            "isolation=inline", "tracking=none", "device=cpu",
        )  # fmt: skip
    assert code == 0
    result, run = result_in(tmp_path)
    metrics = result["metrics"]
    assert 20 < metrics["quality/psnr_db"] < 80 and 0 < metrics["quality/latent_relative_l2"] < 0.1
    assert metrics["quality/finite"] == 1 and metrics["offload/copies"] > 0
    images = sorted(file.name for file in (run / "images").iterdir())
    assert images == ["0000.png", "0001.png", "difference.png", "grid.png", "reference.png"]
    history = (run / "history.csv").read_text().splitlines()
    assert history[0].split(",")[0] == "step" and len(history) == 1 + 2 * 2


def test_a_run_compared_with_another_model_is_another_run(pipeline_folder: Folder, tmp_path: Path) -> None:
    original = pipeline_folder("flux")
    qexp.save(qexp.load_pipeline(original, "torchao", device="cpu"), tmp_path / "saved")
    for name in ("same", "other"):
        shutil.copytree(original, tmp_path / name)
    file = next((tmp_path / "other" / "transformer").glob("*.safetensors"))
    save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    shutil.copytree(original, tmp_path / "rescheduled")
    scheduler = tmp_path / "rescheduled" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("{", '{"shift": 7.5,', 1))
    keys = [
        run_key(config(tmp_path / "saved", f"model.reference_path={path}"))
        for path in (original, tmp_path / "same", tmp_path / "other", tmp_path / "rescheduled")
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    with pytest.raises(ConfigError, match=r"set model\.reference_path to the unquantized model"):
        run_key(config(tmp_path / "saved"))


@pytest.mark.parametrize(
    "setting",
    representatives(["task.num_images=3", "task.max_new_tokens=3", "task.temperature=0.5"], ["task.num_images=3"]),
)
def test_a_setting_that_pipelines_have_no_use_for_is_refused(setting: str, pipeline_folder: Folder) -> None:
    with pytest.raises(
        ConfigError, match=rf"{setting} has no effect on this model.*; leave it out, or set .*num_images_per_prompt"
    ):
        config(pipeline_folder("flux"), setting)


@pytest.mark.exhaustive
def test_an_unknown_argument_is_said_before_weights_are_read(pipeline_folder: Folder, tmp_path: Path) -> None:
    done = command(
        tmp_path, "model=diffusers", f"model.path={pipeline_folder('flux')}", "task.prompt=a cube", "backend=none",
        "+task.pipeline_arguments.guidence_scale=3",
    )  # fmt: skip
    assert done.returncode == 1
    assert "guidence_scale is no argument of FluxPipeline (did you mean guidance_scale" in done.stdout + done.stderr


def test_the_page_runs(pipeline_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    (tmp_path / "pipeline").symlink_to(pipeline_folder("flux"))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["image"].size == (32, 32) and names["transformer"].quantization_method == "torchao"
    for line in re.findall(r"^python -m qexp -?m? ?(model=.*)$", page, flags=re.MULTILINE):
        settings = re.findall(r"(?:'[^']*'|\S)+", line.replace("/path/to/folder", "pipeline"))
        settings = [
            re.sub(r"backend=none,|offload=none,", lambda found: found[0].split("=")[0] + "=", s) for s in settings
        ]
        run_config("device=cpu", *(setting.replace("'", "") for setting in settings))


def test_a_pattern_must_match_in_one_of_those_that_share_it(pipeline_folder: Folder) -> None:
    import torch

    from qexp.loading.components import plan_components, request_components
    from qexp.models.base import load_source

    def plan(*overrides: str) -> None:
        found = config(pipeline_folder("flux"), "model.quantize=[transformer,text_encoder_2]", *overrides)
        plan_components(request_components(load_source(found.model), found.components, device=torch.device("cpu")))

    plan("skip_modules=[proj_out,encoder.block.0]")  # the first is the transformer's, the other the encoder's
    with pytest.raises(ConfigError, match=r"'proj_aut' matches no module; did you mean proj_out"):
        plan("skip_modules=[proj_aut,encoder.block.0]")
    with pytest.raises(ConfigError, match="skip_modules of 'text_encoder_2': the pattern 'proj_out' matches no module"):
        plan("+components.text_encoder_2.skip_modules=[proj_out]")
