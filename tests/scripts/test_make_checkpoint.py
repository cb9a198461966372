"""Made checkpoints: the published layout, finite forwards, and nothing half-written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_checkpoint
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from make_checkpoint import Layout, shortened, write_architecture, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from qexp.errors import ConfigError, DiskError
from qexp.models import architectures
from qexp.models.architectures import component_of
from tests.products import representatives

TINY = {
    "_class_name": "FluxTransformer2DModel", "attention_head_dim": 16, "guidance_embeds": True, "in_channels": 4,
    "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 3, "patch_size": 1,
    "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip


def flux_answer(model: Any) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(
            hidden_states=torch.ones(1, 16, 4, dtype=model.dtype),
            encoder_hidden_states=torch.ones(1, 8, 32, dtype=model.dtype),
            pooled_projections=torch.ones(1, 32, dtype=model.dtype), timestep=torch.tensor([0.5], dtype=model.dtype),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3), guidance=torch.tensor([3.5]), return_dict=False,
        )[0]  # fmt: skip
    return answer


@pytest.mark.parametrize("shards", [1, 3])
def test_diffusers_opens_what_is_written_and_its_answer_is_finite(tmp_path: Path, shards: int) -> None:
    from diffusers import FluxTransformer2DModel

    write_checkpoint(tmp_path / "model", TINY, shards)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == shards
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    answer = flux_answer(model)
    assert torch.isfinite(answer).all() and answer.float().std() > 1e-3


def test_weights_are_normal_and_scales_of_norms_near_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {**TINY, "num_attention_heads": 8}, 1)
    tensors = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    weight = tensors["single_transformer_blocks.0.proj_mlp.weight"].double()  # [512, 128]
    assert weight.mean().abs() < 3 * 0.02 / weight.numel() ** 0.5
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    kurtosis = (weight / weight.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.1)  # of a normal distribution
    other = tensors["single_transformer_blocks.1.proj_mlp.weight"].double()
    assert torch.corrcoef(torch.stack([weight.flatten(), other.flatten()]))[0, 1].abs() < 0.02
    assert tensors["transformer_blocks.0.attn.norm_q.weight"].float().mean().item() == pytest.approx(1, abs=0.02)


def test_the_bytes_depend_on_the_seed_and_not_on_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SLICE_WEIGHTS", 100)
    layout = Layout(TINY, "bfloat16", 10)
    layout.write(tmp_path / "one", "one", workers=1)
    layout.write(tmp_path / "four", "four", workers=4)
    layout.write(tmp_path / "other", "other", seed=1)
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "four" / file).read_bytes()
    assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_large_tensors_are_written_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SLICE_WEIGHTS", 100)
    Layout(TINY, "float32", 10).write(tmp_path / "model", "model")
    weight = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")["x_embedder.weight"]  # [32, 4]
    assert weight.dtype == torch.float32
    assert len(weight.unique()) > 120  # of 128: the second slice does not repeat the first
    assert weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_files_are_split_as_the_libraries_split_them() -> None:
    layout = Layout(TINY, "bfloat16", 3e-5)  # 30 kB
    tensors = {name: torch.empty(tensor.shape, dtype=torch.bfloat16) for name, tensor in layout.tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=30_000
    )
    assert layout.files == split.filename_to_tensors
    assert len(layout.files) > 3


@pytest.mark.parametrize(
    ("what", "files"),
    representatives(
        [
            ("flux_dev/transformer", 3), ("flux_dev/text_encoder_2", 2), ("sd35_large/transformer", 2),
            ("qwen_image/transformer", 9), ("qwen_image/text_encoder", 4), ("wan_1_3b/transformer", 2),
            ("wan/transformer", 12), ("wan/text_encoder", 5),
        ],
        [("flux_dev/text_encoder_2", 2), ("wan_1_3b/transformer", 2), ("wan/text_encoder", 5)],
    ),
)  # fmt: skip
def test_there_are_as_many_files_as_were_published(what: str, files: int) -> None:
    component = component_of(*what.split("/"))
    layout = Layout(component.config, component.dtype, component.max_shard_gb)
    assert len(layout.files) == files
    if what == "wan/text_encoder":  # 4,972,389,712 bytes are published, with the header
        names = next(iter(layout.files.values()))
        first = sum(layout.tensors[name].numel() * 4 for name in names)
        assert 0 < 4_972_389_712 - first < 4096


def test_a_component_of_an_architecture_with_fewer_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        architectures,
        "component_of",
        lambda name, part: SimpleNamespace(config=TINY, dtype="float16", max_shard_gb=10),
    )
    write_architecture(tmp_path / "half", "flux_dev/transformer", fraction=0.5)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == {**TINY, "num_layers": 1, "num_single_layers": 2}
    tensors = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert tensors["x_embedder.weight"].dtype == torch.float16
    assert not any(name.startswith("single_transformer_blocks.2") for name in tensors)


def test_a_pipeline_has_its_index_and_a_folder_for_each_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = component_of("flux_dev", "vae")
    small = {**vae.config, "block_out_channels": [32, 32, 32, 32]}
    model = architectures.architecture("flux_dev")
    parts = {
        "transformer": SimpleNamespace(config=TINY, dtype="bfloat16", max_shard_gb=10),
        "vae": SimpleNamespace(config=small, dtype="bfloat16", max_shard_gb=10),
    }
    fake = SimpleNamespace(model_index=model.model_index, scheduler=model.scheduler, components=parts)
    monkeypatch.setattr(architectures, "architecture", lambda name: fake)
    write_architecture(tmp_path / "flux", "flux_dev")
    written = {str(path.relative_to(tmp_path / "flux")) for path in (tmp_path / "flux").rglob("*.*")}
    assert written == {
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
        "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * 10**9))
    yield


@pytest.mark.usefixtures("no_room")
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        DiskError, match=r"needs 23\.8 GB and 1\.1 GB to spare, but its disk has 20\.0 GB free; .*--fra"
    ):
        write_architecture(tmp_path / "flux", "flux_dev/transformer")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_complete_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_checkpoint, "_pwrite", fail)
    with pytest.raises(DiskError, match="No space left on device; make room"):
        write_checkpoint(tmp_path / "model", TINY, 1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".model.unfinished").mkdir()  # of one that was killed
    write_checkpoint(tmp_path / "model", TINY, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ConfigError, match="exists; remove it"):
        write_checkpoint(tmp_path / "model", TINY, 1)


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_a_fraction_is_above_zero_and_one_at_most(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"--fraction {fraction} must be above 0, and 1 at most"):
        shortened(TINY, fraction)
