"""Published architectures at true size, on the meta device: they are the models that their authors counted."""

import importlib
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.errors import ConfigError
from qexp.models.architectures import (
    ComponentArchitecture,
    architecture,
    architecture_names,
    as_checkpoint,
    component_of,
    network,
    stored_tensors,
)
from tests.products import representatives

# What the authors say of their models, in billions of parameters.
PUBLISHED_BILLIONS = {
    "flux_dev/transformer": 11.90, "flux_dev/text_encoder": 0.123, "flux_dev/text_encoder_2": 4.76,
    "flux_schnell/transformer": 11.89, "sd3_medium/transformer": 2.03, "sd3_medium/text_encoder_2": 0.695,
    "sd35_large/transformer": 8.06, "qwen_image/transformer": 20.43, "qwen_image/text_encoder": 8.29,
    "sdxl/unet": 2.57, "pixart_sigma/transformer": 0.611, "wan/transformer": 14.29, "wan_1_3b/transformer": 1.42,
    "wan/text_encoder": 5.68,
}  # fmt: skip
PUBLISHED_BYTES = {  # total_size of their indices, and of single files without the header
    "flux_dev/transformer": 23_802_816_640,
    "flux_dev/text_encoder_2": 9_524_621_312,
    "sd3_medium/transformer": 4_169_902_208,
    "sdxl/unet": 10_269_854_736,
}
COMPONENTS = [(name, part) for name in architecture_names() for part in architecture(name).components]
# by default those that the tests below build anyway, another layout of a denoiser, and an autoencoder
KEPT = [
    *PUBLISHED_BYTES, "flux_dev/text_encoder", "sdxl/text_encoder_2", "qwen_image/text_encoder",
    "pixart_sigma/transformer", "wan/vae",
]  # fmt: skip


@cache
def built(config: str) -> nn.Module:
    return network(json.loads(config))


def model_of(component: ComponentArchitecture) -> nn.Module:
    return built(json.dumps(component.config))


@pytest.mark.parametrize(("name", "part"), representatives(COMPONENTS, [tuple(what.split("/")) for what in KEPT]))
def test_a_network_has_the_parameters_of_the_published_one(name: str, part: str) -> None:
    component = component_of(name, part)
    model = model_of(component)
    assert all(parameter.is_meta for parameter in model.parameters())
    places = {parameter.untyped_storage()._cdata: parameter.numel() for parameter in model.parameters()}
    assert sum(places.values()) == component.parameters
    if (billions := PUBLISHED_BILLIONS.get(f"{name}/{part}")) is not None:
        assert component.parameters / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize("what", PUBLISHED_BYTES)
def test_its_files_have_the_published_bytes(what: str) -> None:
    component = component_of(*what.split("/"))
    assert as_checkpoint(component, model_of(component), Path("nowhere")).nbytes == PUBLISHED_BYTES[what]


@pytest.mark.parametrize("name", architecture_names())
def test_a_model_index_names_the_classes_of_its_components(name: str) -> None:
    model = architecture(name)
    assert model.source.startswith(f"https://huggingface.co/{model.repository}")
    diffusers = importlib.import_module("diffusers")
    assert hasattr(diffusers, model.model_index["_class_name"])
    assert model.scheduler["_class_name"] == model.model_index["scheduler"][1]
    for part, component in model.components.items():
        library, kind = model.model_index[part]
        assert hasattr(importlib.import_module(library), kind)
        stated = component.config.get("_class_name") or component.config["architectures"][0]
        assert stated == kind


def test_files_have_the_names_that_were_published() -> None:
    def names(what: str) -> set[str]:
        return stored_tensors(model_of(component_of(*what.split("/")))).keys()

    assert "single_transformer_blocks.37.proj_mlp.weight" in names("flux_dev/transformer")
    assert "text_model.encoder.layers.11.self_attn.q_proj.weight" in names("flux_dev/text_encoder")
    assert "text_projection.weight" in names("sdxl/text_encoder_2")
    assert {"model.layers.27.mlp.up_proj.weight", "visual.merger.mlp.0.weight"} <= names("qwen_image/text_encoder")
    shared = names("flux_dev/text_encoder_2")
    assert "shared.weight" in shared and "encoder.embed_tokens.weight" not in shared  # one tensor, written once


def test_what_a_network_computes_is_stored_with_its_values() -> None:
    tensors = stored_tensors(model_of(component_of("sd3_medium", "transformer")))
    own = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    assert own.keys() == {"pos_embed.pos_embed"}
    assert torch.isfinite(own["pos_embed.pos_embed"]).all()


def test_a_wrong_name_lists_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"'flux_def' is unknown \(did you mean flux_dev or flux_schnell\?\); use flux"
    ):
        architecture("flux_def")
    with pytest.raises(ConfigError, match="no component 'unet'; use text_encoder, text_encoder_2, transformer or vae"):
        component_of("flux_dev", "unet")
