"""Which files of a folder hold the weights: those that transformers and diffusers read in the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexp.checkpoints.checkpoint import open_checkpoint, read_object
from qexp.checkpoints.weight_files import weight_files
from qexp.errors import LoadError
from qexp.hub.file_selection import needed_files

DIFFUSION = "diffusion_pytorch_model.safetensors"
MODEL = "model.safetensors"


def bert(folder: Path, seed: int, **options: Any) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=40, **shape)).save_pretrained(folder, **options)
    return folder


def bert_weight(folder: Path) -> torch.Tensor:
    from transformers import BertModel

    return BertModel.from_pretrained(folder).get_parameter("encoder.layer.0.intermediate.dense.weight")


def dit(folder: Path, seed: int, **options: Any) -> Path:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    DiTTransformer2DModel(**shape, norm_num_groups=4).save_pretrained(folder, **options)
    return folder


def dit_weight(folder: Path) -> torch.Tensor:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(folder).get_parameter("transformer_blocks.0.attn1.to_q.weight")


SHARDED = {"max_shard_size": "20KB"}


def whole_over_shards(folder: Path, save: Callable[..., Path], name: str) -> None:
    """A whole save beside the shards and the index of another model."""
    save(folder, 1, **SHARDED)
    shutil.copy(save(folder.with_name("whole"), 2) / name, folder)


def save_over_shards(folder: Path, save: Callable[..., Path], name: str) -> None:
    """As save_pretrained leaves a folder that had shards."""
    save(folder, 1, **SHARDED)
    save(folder, 2)


def shards_over_whole(folder: Path, save: Callable[..., Path], name: str) -> None:
    save(folder, 1)
    save(folder, 2, **SHARDED)


def original_beside(folder: Path, save: Callable[..., Path], name: str) -> None:
    """The authors' own file, its index, and variants."""
    save(folder, 2)
    other = load_file(save(folder.with_name("other"), 1) / name)
    for beside in ("consolidated.safetensors", "consolidated.00.safetensors", name.replace(".safe", ".fp16.safe")):
        save_file(other, folder / beside)
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "consolidated.safetensors")}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))


def of_the_other_library(folder: Path, save: Callable[..., Path], name: str) -> None:
    save(folder, 2)
    shutil.copy(save(folder.with_name("other"), 1) / name, folder / (DIFFUSION if name == MODEL else MODEL))


@pytest.mark.parametrize(("save", "read", "name"), [(bert, bert_weight, MODEL), (dit, dit_weight, DIFFUSION)])
@pytest.mark.parametrize(
    "make", [whole_over_shards, save_over_shards, shards_over_whole, original_beside, of_the_other_library]
)
def test_the_weights_are_those_that_the_library_reads(
    make: Callable[..., None], save: Callable[..., Path], read: Callable[..., torch.Tensor], name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    make(folder, save, name)
    try:
        expected = read(folder)
    except OSError:  # diffusers reads the index first, and its shards are gone
        with pytest.raises(LoadError, match=f"which is missing; .* delete the index: {name} is beside it"):
            open_checkpoint(folder)
        return
    entries = [entry for n, entry in open_checkpoint(folder).entries.items() if n.endswith(WEIGHT_OF[name])]
    assert len(entries) == 1
    assert torch.equal(load_file(entries[0].file)[entries[0].name], expected)
    names = [path.name for path in folder.iterdir()]
    wanted = needed_files(names, lambda file: read_object(folder / file), "a repository")
    assert [n for n in wanted if "safetensors" in n] == weight_files(names, lambda n: read_object(folder / n), "here")
    assert {folder / n for n in wanted if n.endswith(".safetensors")} == set(open_checkpoint(folder).files)


WEIGHT_OF = {MODEL: "encoder.layer.0.intermediate.dense.weight", DIFFUSION: "transformer_blocks.0.attn1.to_q.weight"}


def test_an_index_decides_between_two_copies_of_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "x-1.safetensors")
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "x-2.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for of_a in ("x-1.safetensors", "x-2.safetensors"):
        index = {"weight_map": {"a": of_a, "b": "x-1.safetensors", "c": "x-2.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        checkpoint = open_checkpoint(tmp_path)
        assert {name: entry.file.name for name, entry in checkpoint.entries.items()} == index["weight_map"]


def no_file(name: str) -> dict[str, Any]:
    raise AssertionError(f"{name} is not to be read")


@pytest.mark.parametrize(
    ("config", "names", "chosen"),
    [
        ({"_class_name": "A", "model_type": "b"}, [MODEL, DIFFUSION], DIFFUSION),
        ({"_class_name": "A"}, [MODEL, "flux1-dev.safetensors"], MODEL),
        ({"model_type": "a"}, [DIFFUSION, "x.safetensors"], DIFFUSION),
        ({"architectures": ["A"]}, [DIFFUSION, MODEL, "model.gguf"], MODEL),
        ({"model_type": "a", "transformers_weights": "b.safetensors"}, [MODEL, "b.safetensors"], "b.safetensors"),
        ({}, [MODEL, f"{MODEL}.index.json", "consolidated.safetensors"], MODEL),
        ({}, ["only.safetensors", "a.gguf", "b.gguf"], "only.safetensors"),
        ({}, ["only.gguf", "README.md"], "only.gguf"),
    ],
)  # fmt: skip
def test_the_name_is_chosen_by_the_config(config: dict[str, Any], names: list[str], chosen: str) -> None:
    assert weight_files([*names, "config.json"], {"config.json": config}.__getitem__, "here") == [chosen]


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({}, [MODEL, DIFFUSION], "does not say which library.s model it is .* keep one of them"),
        ({"model_type": "a", "transformers_weights": "b.safetensors"}, [MODEL], "transformers_weights='b.safetensors'"),
        ({"model_type": "a", "transformers_weights": "../b.bin"}, [MODEL, "../b.bin"], "transformers_weights="),
        ({"model_type": "a"}, ["a.gguf", "b.gguf"], "several .gguf files .* set model.path to one of them"),
    ],
)  # fmt: skip
def test_a_folder_whose_weights_are_not_clear_is_refused(
    config: dict[str, Any], names: list[str], message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        weight_files([*names, "config.json"], {"config.json": config}.__getitem__, "here")
