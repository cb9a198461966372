"""Settings of components mean the same on the command line and in Python, and the checkpoint has the last word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qexp
from qexp.api.arguments import backend_config
from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError
from qexp.models.component_settings import parse_component
from tests.assigning import run_config


class PlannedFarEnoughError(Exception):
    pass


def settings_of_pipeline(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> dict[str, Any]:
    """The merged settings that `qexp.load_pipeline` would load with."""
    from qexp.loading import components

    seen: dict[str, Any] = {}

    def stop(requests: dict[str, Any], **_: Any) -> None:
        seen.update({name: request.settings for name, request in requests.items()})
        raise PlannedFarEnoughError

    monkeypatch.setattr(components, "plan_components", stop)
    with pytest.raises(PlannedFarEnoughError):
        qexp.load_pipeline(*arguments, device="cpu", **options)
    return seen


def test_command_line_and_python_merge_alike(
    pipeline_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipeline_folder("flux")
    typed = run_config(
        "model=diffusers", f"model.path={folder}", "task.prompt=[a]", "device=cpu", "backend=torchao",
        "skip_modules=[proj_out,context_embedder]", "compute_dtype=bf16", "+components.vae.compute_dtype=fp32",
        "+backend@components.text_encoder_2.backend=quanto",
        "+components.text_encoder_2.skip_modules=[encoder.block.0]",
    ).components  # fmt: skip
    import torch

    own = {
        "vae": {"compute_dtype": torch.float32},
        "text_encoder_2": {"backend": "quanto", "skip_modules": iter(["encoder.block.0"])},
    }
    skip = ("context_embedder", "proj_out", "proj_out")
    options: dict[str, Any] = {"skip_modules": skip, "compute_dtype": torch.bfloat16, "components": own}
    assert settings_of_pipeline(monkeypatch, folder, "torchao", **options) == typed
    assert {name: settings.backend.quant_method for name, settings in typed.items()} == {
        "transformer": "torchao", "text_encoder": "none", "text_encoder_2": "quanto", "vae": "none",
    }  # fmt: skip
    assert typed["transformer"].skip_modules == ("context_embedder", "proj_out")
    assert typed["text_encoder_2"].skip_modules == ("encoder.block.0",) and typed["vae"].skip_modules == ()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "field": ({"dtype": "bf16"}, r"components\.vae\.dtype is not a known field"),
    "dtype": ({"compute_dtype": "int8"}, r"components\.vae\.compute_dtype=int8 is not a compute dtype"),
    "pattern": ({"skip_modules": "head"}, r"components\.vae\.skip_modules=head must be a list, such as \[head\]"),
    "patterns": ({"skip_modules": {"head": 1}}, r"components\.vae\.skip_modules=.* must be a list"),
    "flag": ({"plain_fp8": 1}, r"components\.vae\.plain_fp8=1 must be true or false"),
    "backend": ({"backend": {"quant_method": "x"}}, r"components\.vae\.backend=.* is no backend; use a name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_field_is_named_by_its_place(case: str) -> None:
    values, message = WRONG[case]
    base = ComponentConfig(backend_config("none"))
    with pytest.raises(ConfigError, match=message):
        parse_component(values, "components.vae.", base=base, to_backend=backend_config)
