"""What stays unquantized though nobody asked for it is said, counted, and in the plan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qexp
from qexp.loading.component import plan_statistics
from qexp.loading.lifecycle import plan_component, request_load
from qexp.models.folder import FolderSource
from tests.language import save_language_model
from tests.loading.toys import save_state, settings


class Net(nn.Module):
    """Of 64·64 + 80·64 + 64·64 weights, those of `narrow` have no whole blocks of 32 in GGUF."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.last = (nn.Linear(width, 64, False) for width in (64, 80, 64))


class KeepsOne(Net):
    _keep_in_fp32_modules = ("last",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_state(tmp_path, Net().state_dict())


def load(folder: Path, kind: type[nn.Module], backend: str, **options: Any) -> Any:
    return qexp.load(folder, backend, skeleton=kind, device="cpu", **options)


def test_layers_that_a_format_cannot_hold_are_said_with_count_share_and_reason(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(folder, Net, "gguf")
    said = capfd.readouterr().err
    assert "model: 1 linear layer (38.5% of its weights) unquantized though nobody asked for it: 'narrow'" in said
    assert said.startswith("warning: ")
    assert "Q8_0 has blocks of 32 weights, which do not divide 80" in said and "skip_modules" in said


def test_layers_that_the_user_skips_are_not_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder, Net, "gguf", skip_modules=["narrow"])
    load(folder, Net, "torchao", skip_modules=["wide"], keep_in_fp32_modules=["last"])
    assert "unquantized" not in capfd.readouterr().err


def test_layers_that_a_class_keeps_in_fp32_are_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder, KeepsOne, "torchao")
    said = capfd.readouterr().err
    assert "model: 1 linear layer (30.8% of its weights) unquantized though nobody asked for it: 'last' (kept" in said


def test_layers_that_a_source_leaves_out_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qexp.load(save_language_model(tmp_path), "torchao", device="cpu")
    assert "model: 1 linear layer (" in (said := capfd.readouterr().err) and "'lm_head'" in said


def test_layers_left_dense_are_metrics_and_in_the_plan(folder: Path) -> None:
    request = request_load(FolderSource(folder, Net), "model", settings("gguf"), device=torch.device("cpu"))
    planned = plan_component(request)
    statistics = plan_statistics([planned.prepared.plan], 1)
    assert statistics["load/left_dense_modules"] == 1
    assert statistics["load/left_dense_share"] == pytest.approx(80 * 64 / (64 * 64 + 80 * 64 + 64 * 64))
    assert planned.prepared.plan.to_container()["left_dense"] == ["narrow"]
