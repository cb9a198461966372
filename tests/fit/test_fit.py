"""Plans of whole models: exact bytes, recipes that load, and errors before a weight is read."""

import csv
import json
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest

import qexp
from qexp.fit import bandwidth, outcome
from qexp.fit.__main__ import main
from qexp.fit.bandwidth import measured_bandwidth
from qexp.fit.layers import ModelLayers
from qexp.sensitivity.table import SensitivityTable
from tests.assigning import commands_assign as commands_assign
from tests.fit.made_scores import write_scores

pytestmark = pytest.mark.usefixtures("commands_assign")

DIGITS = ["model=digits"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    write_scores(folder, DIGITS)
    return folder


@pytest.fixture
def without_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "draw_front", lambda *_: b"")


def planned(outputs: Path, scores: Path, *words: str) -> dict[str, object]:
    """The plan.json of `fit --plan`."""
    assert main([*DIGITS, f"scores={scores}", f"paths.outputs={outputs}", *words, "--plan"]) == 0
    (path,) = outputs.glob("fit/*/plan.json")
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_recipe_of_a_plan_loads_with_the_predicted_bytes(
    tmp_path: Path, scores: Path, without_figure: None, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, scores, "bits=4.5")
    (recipe,) = tmp_path.glob("fit/*/recipe.yaml")
    model = qexp.load("digits", f"@{recipe}", device="cpu")
    predicted = plan["predicted"]
    assert isinstance(predicted, dict) and predicted["weights_bytes"] == qexp.memory_footprint(model)
    assert 4.45 < predicted["bits_per_weight"] <= 4.5
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m qexp"))
    assert f"backend.recipe=@{recipe}" in shlex.split(line)
    # every layer has the format that layers.csv says
    with (recipe.parent / "layers.csv").open() as stream:
        rows = {row["layer"]: row["format"] for row in csv.DictReader(stream)}
    assert len(set(rows.values())) > 2 and rows.keys() <= dict(model.named_modules()).keys()


def test_front_is_never_worse_than_a_uniform_format_of_the_same_bytes(tmp_path: Path, scores: Path) -> None:
    planned(tmp_path, scores, "bits=4.5")
    (front,) = tmp_path.glob("fit/*/front.csv")
    with front.open() as stream:
        rows = list(csv.DictReader(stream))
    mixes = [row for row in rows if row["kind"] == "mix"]
    assert len(mixes) >= 15 and (front.parent / "front.png").stat().st_size > 10_000
    for row in rows:
        within = [mix for mix in mixes if int(mix["weights_bytes"]) >= int(row["weights_bytes"])]
        assert not within or min(float(mix["predicted_error"]) for mix in within) <= float(row["predicted_error"])


def refused(capsys: pytest.CaptureFixture[str], scores: Path, *words: str) -> str:
    assert main([*DIGITS, f"scores={scores}", *words, "--plan"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    return line


def test_budget_that_nothing_meets_names_the_smallest_that_can_be_met(
    tmp_path: Path, scores: Path, without_figure: None, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = f"paths.outputs={tmp_path}"
    for name, value in (("weights", "1MiB"), ("bits", "2"), ("memory", "100MiB")):
        message = refused(capsys, scores, f"{name}={value}", outputs)
        assert message.startswith(f"error: {name}=") and "cannot be met" in message
        least = message.partition(f"give at least {name}=")[2].partition(",")[0]
        assert main([*DIGITS, f"scores={scores}", f"{name}={least}", outputs, "--plan"]) == 0
        assert "qexp_packed uint2wo × 31" in capsys.readouterr().out


def test_scores_of_another_checkpoint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(table: SensitivityTable) -> SensitivityTable:
        return replace(table, header=replace(table.header, checkpoint={"transformer": "f" * 64}))

    write_scores(tmp_path, DIGITS, change=other)
    assert "has the scores of another checkpoint" in refused(capsys, tmp_path, "bits=4.5")


def test_scores_that_count_other_bytes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(table: SensitivityTable) -> SensitivityTable:
        changed = [replace(one, nbytes=one.nbytes + (one.format == "gguf Q4_0")) for one in table.candidates]
        return replace(table, candidates=tuple(changed))

    write_scores(tmp_path, DIGITS, change=other)
    message = refused(capsys, tmp_path, "bits=4.5")
    assert "gguf Q4_0 of " in message and "by the plan of this model" in message


def test_layers_that_are_skipped_here_are_refused(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, scores, "bits=4.5", "skip_modules=[blocks.0.attn]")
    assert "which no format is chosen for here" in message


def test_formats_without_scores_are_refused(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, scores, "bits=4.5", "formats=[gguf_q4_0,torchao]")
    assert "has no scores of torchao int8wo" in message


def test_model_without_scores_is_refused_as_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DIGITS, "bits=4.5", f"paths.outputs={tmp_path}", "--plan"]) == 1
    assert "has no scores of this model" in capsys.readouterr().err
    assert main([*DIGITS, "bits=1", f"paths.outputs={tmp_path}"]) == 1  # before a run that reads weights
    assert "bits=1 cannot be met" in capsys.readouterr().err


def test_quantized_checkpoint_is_refused(tmp_path: Path, scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qexp.save(qexp.load("digits", "bitsandbytes", device="cpu"), tmp_path / "saved")
    message = refused(capsys, scores, "bits=4.5", f"model.path={tmp_path / 'saved'}")
    assert "is quantized already" in message


def test_layers_rest_elsewhere_only_as_far_as_time_allows(
    tmp_path: Path, scores: Path, without_figure: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below the smallest formats, layers travel; with no time for that, nothing keeps both bounds."""
    outputs = f"paths.outputs={tmp_path}"
    message = refused(capsys, scores, "memory=100MiB", outputs)
    least = float(message.partition("give at least memory=")[2].partition("MiB")[0])
    words = [f"memory={least - 0.4:.2f}MiB", "bandwidth=1GB/s", outputs]
    message = refused(capsys, scores, *words, "step_ms=0.01")
    assert "no choice of formats and places keeps both" in message
    plan = planned(tmp_path, scores, *words, "step_ms=50")
    predicted = plan["predicted"]
    assert isinstance(predicted, dict) and 0 < predicted["travelling_bytes"] <= 50_000_000
    assert predicted["device_bytes"] <= (least - 0.4) * (1 << 20)


def test_bandwidth_of_a_disk_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MEASURED_BYTES", 16 << 20)  # 256 MiB take a second and a half
    assert measured_bandwidth("cpu") > 1e6


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    layers: ModelLayers = write_scores(folder, ["flux_dev"])
    assert sum(len(one.order) for one in layers.components.values()) > 700
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("places", [(), ("step_ms=2000", "bandwidth=20GB/s")], ids=["resident", "places"])
@pytest.mark.parametrize("memory", ["16GiB", "12GiB", "8GiB"])
def test_flux_is_planned_within_five_seconds(
    tmp_path: Path, flux: Path, memory: str, places: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from qexp.fit.opened import open_model
    from qexp.fit.plan import choose_mix, plan_fit
    from qexp.fit.request import read_request

    request = read_request(["flux_dev", f"memory={memory}", *places])
    with open_model(request) as opened:
        started = time.process_time()
        plan = plan_fit(opened, request, flux, 20e9)
        mix = choose_mix(plan, request)
        seconds = time.process_time() - started
    assert max(plan.limits.excess(mix)) <= 0
    assert seconds < 5
