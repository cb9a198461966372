"""A run parses each file that describes its checkpoint once, in the process that composes it and in the worker."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexp
from qexp.checkpoints import gguf_header, parse_once
from qexp.experiments import resolve
from qexp.experiments.run import run_experiment
from qexp.loading import lifecycle
from qexp.models.component_settings import merge_with_checkpoint
from qexp.scoring.score import score
from qexp.sweep.run_key import reference_key, run_key
from tests.assigning import run_config
from tests.pipelines import save_pipeline
from tests.products import exhaustive

DIGITS = Path(qexp.__file__).parent / "assets/digits"
QUICK = ("task.num_images=1", "task.num_inference_steps=1")


def one_file(folder: Path) -> tuple[str, ...]:
    (weights,) = DIGITS.glob("diffusion*.safetensors")
    save_file(load_file(weights), folder / "model.safetensors")
    (folder / "config.json").write_bytes((DIGITS / "config.json").read_bytes())
    return f"model.path={folder}", *QUICK


def shards(folder: Path) -> tuple[str, ...]:
    qexp.save(qexp.load("digits", device="cpu"), folder, max_shard_gib=0.004)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return f"model.path={folder}", *QUICK


def gguf(folder: Path) -> tuple[str, ...]:
    qexp.save(qexp.load("digits", "gguf_q4_0", device="cpu", skip_modules=["proj_out"]), folder)
    return f"model.path={folder}", *QUICK


def pipeline(folder: Path) -> tuple[str, ...]:
    save_pipeline("flux", folder / "flux")
    size = ("task.height=32", "task.width=32", "task.num_inference_steps=1", "task.max_sequence_length=16")
    return "model=diffusers", f"model.path={folder / 'flux'}", "task.prompt=[a cube]", *size


def lora(folder: Path) -> tuple[str, ...]:
    overrides = pipeline(folder)
    (weights,) = (folder / "flux/transformer").glob("*.safetensors")
    layer = "transformer_blocks.0.attn.to_q"
    out, into = load_file(weights)[f"{layer}.weight"].shape
    tensors = {"A": torch.ones(2, into), "B": torch.ones(out, 2)}
    named = {f"transformer.{layer}.lora_{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(named, folder / "lora.safetensors")
    return (*overrides, f"model.lora={folder / 'lora.safetensors'}")


def round_trip(folder: Path) -> tuple[str, ...]:
    return one_file(folder)[0], "task=roundtrip"


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often our own code parsed each JSON text, and each GGUF header by its file."""
    counts: Counter[Any] = Counter()
    loads, read = json.loads, gguf_header._Header.read

    def counting_loads(text: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("qexp.checkpoints"):
            counts[text if isinstance(text, str) else bytes(text).decode()] += 1
        return loads(text, **options)

    def counting_read(header: Any) -> Any:
        counts[header.file] += 1
        return read(header)

    monkeypatch.setattr(json, "loads", counting_loads)
    monkeypatch.setattr(gguf_header._Header, "read", counting_read)
    return counts


@pytest.mark.parametrize(
    "make", [exhaustive(one_file), shards, gguf, exhaustive(pipeline), lora, round_trip], ids=lambda make: make.__name__
)  # round_trip is of one file, lora of a pipeline
def test_each_file_is_parsed_once_in_each_process(
    make: Callable[[Path], tuple[str, ...]],
    tmp_path: Path,
    parses: Counter[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the settings of each component are merged with its checkpoint once."""
    overrides, run = make(tmp_path), tmp_path / "run"
    run.mkdir()
    merged = Counter[str]()

    def counting_merge(settings: Any, checkpoint: Any, component: str, *rest: Any, **options: Any) -> Any:
        merged[component] += 1
        return merge_with_checkpoint(settings, checkpoint, component, *rest, **options)

    for module in (resolve, lifecycle):
        monkeypatch.setattr(module, "merge_with_checkpoint", counting_merge)
    parse_once._parsed.clear()
    parses.clear()
    config = run_config("device=cpu", "backend=torchao", *overrides)
    run_key(config)
    if config.task.saves_outputs:
        reference_key(config)
    assert parses and max(parses.values()) == 1, parses.most_common(2)
    assert merged == dict.fromkeys(config.components, 1)

    parse_once._parsed.clear()  # the worker is another process
    parses.clear()
    merged.clear()
    run_experiment(config, run)
    score(config, run, None)
    assert parses and max(parses.values()) == 1, parses.most_common(2)
    assert merged == dict.fromkeys(config.components, 1)
