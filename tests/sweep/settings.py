"""A complete configuration for tests of the sweep, with a checkpoint of a few bytes."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.config import schema
from qexp.config.generate import GenerateConfig, for_images
from qexp.config.schema import ComponentConfig, RunConfig
from qexp.models.digits import DigitsModelConfig
from qexp.quantizers.bitsandbytes_support.config import BitsAndBytesConfig

BACKEND = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def write_checkpoint(folder: Path, value: float = 1.0) -> Path:
    """A safetensors file with one number."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(header)) + header + struct.pack("<f", value)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
    return folder


def run_config(tmp_path: Path, behaviour: int = 1, **changes: Any) -> RunConfig:
    """An experiment with outputs below `tmp_path`; `behaviour` is one of fake_experiment's."""
    checkpoint = tmp_path / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    config = RunConfig(
        model=DigitsModelConfig(path=str(checkpoint)),
        components={"transformer": ComponentConfig(backend=BACKEND)},
        offload=schema.OffloadConfig(),
        task=for_images(GenerateConfig(num_images=behaviour)),
        metrics=schema.MetricsConfig(names=("psnr_db",)),
        tracking=schema.TrackingConfig(mode="none"),
        isolation=schema.IsolationConfig(),
        sweep=schema.SweepConfig(name="test"),
        loader=schema.LoaderConfig(),
        save=schema.SaveConfig(),
        reference=schema.ReferenceConfig(),
        paths=schema.PathsConfig(outputs=str(tmp_path / "outputs")),
        device="cpu",
        seed=0,
        resume="missing",
    )
    return replace(config, **changes)


def with_backend(config: RunConfig, backend: Any, **component: Any) -> RunConfig:
    settings = replace(config.components["transformer"], backend=backend, **component)
    return replace(config, components={"transformer": settings})
