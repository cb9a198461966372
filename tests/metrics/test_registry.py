"""Every metric is declared in one file, and what reads the declarations shows its values as they are stored."""

import ast
import csv
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qexp.config.schema import MetricsConfig
from qexp.metrics.registry import GROUPS, TASKS, Metric, Result, Samples, all_metrics, chosen_metrics, find_metric
from qexp.report.pareto import file_name, plotted_metrics, points_of
from qexp.report.results_csv import results_csv
from qexp.report.table import format_table, number_columns, prepare, table_cells
from qexp.results.rows import Row, rows_of_sweep
from qexp.tracking.wandb_run import _run_summary
from tests.report.factory import config, job, manifest, run_folder

ROOT = Path(__file__).parents[2]
NAME = re.compile(rf"({'|'.join(GROUPS)})/[a-z0-9_]*[a-z0-9]")


def metric_literals(path: Path) -> Iterator[str]:
    """The metrics that a file of the program names, whole strings of the form group/name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            yield node.value


def test_every_metric_that_the_program_names_is_declared() -> None:
    named = {name for path in (ROOT / "qexp").rglob("*.py") for name in metric_literals(path)}
    assert len(named) > 50 and {"time/step_ms", "load/seconds", "offload/copies"} <= named
    assert [name for name in sorted(named) if find_metric(name) is None] == []


def test_declarations_are_whole() -> None:
    for metric in all_metrics().values():
        assert metric.group in GROUPS and metric.meaning and set(metric.tasks) <= set(TASKS)
        assert metric.range[0] < metric.range[1]
        assert metric.count_name is None or metric.count_name in all_metrics()
        assert not metric.axis or metric.better  # else there is no front
        format(1.5, metric.digits)
        for part, unit in {"gib": "GiB", "ms": "ms", "db": "dB", "seconds": "s"}.items():
            assert metric.unit == unit or part not in metric.short_name.split("_")


def test_what_varies_is_time_and_peaks() -> None:
    varying = {metric.name for metric in all_metrics().values() if metric.varies}
    assert {"time/tokens_per_second", "time/step_ms_max", "load/seconds", "load/peak_file_gib"} <= varying
    assert not any(name.startswith(("quality/", "roundtrip/", "offload/")) for name in varying)
    assert "memory/weights_gib" not in varying and "time/measured_steps" not in varying


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("memory/weights_cuda_0_gib", "memory/weights_*_gib"), ("quality/nsfw_content_detected", "quality/*_detected"),
        ("memory/weights_gib", "memory/weights_gib"), ("quality/psnr", None), ("weights_gib", None),
    ],
)  # fmt: skip
def test_a_name_finds_its_declaration(name: str, declared: str | None) -> None:
    metric = find_metric(name)
    assert (metric and metric.name) == declared


def test_options_offer_what_is_declared() -> None:
    chosen = {name: metric.setting for name, metric in chosen_metrics().items()}
    assert set(MetricsConfig().names) == {name for name, setting in chosen.items() if setting is None}
    perceptual = yaml.safe_load((ROOT / "conf/metrics/perceptual.yaml").read_text(encoding="utf-8"))
    assert sorted(perceptual["names"]) == sorted(chosen)
    assert set(chosen.values()) - {None} == set(perceptual) - {"names", "missing"}


def test_the_list_in_the_documentation_is_the_registry() -> None:
    script = [sys.executable, str(ROOT / "scripts/metrics_table.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.count("\n") == 2 + len(all_metrics())
    assert printed in (ROOT / "outputs/README.md").read_text(encoding="utf-8")


# From a result to what people see


def shown_value(metric: Metric, place: int) -> float:
    """A value of its own for each metric, none of them round."""
    return (1 + place * 0.0137531) * (0.01 if metric.unit == "GiB" else 1)


def rows_with_every_metric(outputs: Path) -> tuple[list[Row], dict[str, float]]:
    """An experiment of each task, with every metric that is declared for it."""
    values = {name: shown_value(metric, place) for place, (name, metric) in enumerate(all_metrics().items())}
    jobs = []
    for number, task in enumerate(TASKS):
        metrics = {name: value for name, value in values.items() if task in all_metrics()[name].tasks}
        run_folder(outputs, task, config(task=task), {**metrics, "quality/finite": 1, "quality/exact": 0})
        jobs.append(job(number, task, [f"task={task}"]))
    manifest(outputs, "first", jobs)
    return rows_of_sweep(outputs, "first"), values | {"quality/finite": 1, "quality/exact": 0}


def test_every_number_is_in_the_csv_as_it_is_stored(tmp_path: Path) -> None:
    rows, values = rows_with_every_metric(tmp_path)
    lines = {line["key"]: line for line in csv.DictReader(io.StringIO(results_csv(rows)))}
    for name, metric in all_metrics().items():
        for task in metric.tasks:
            assert float(lines[task][name]) == values[name]


def test_every_number_is_in_the_plots_data_as_it_is_stored(tmp_path: Path) -> None:
    rows, values = rows_with_every_metric(tmp_path)
    for name, metric in all_metrics().items():
        found = points_of(rows, metric)
        assert {point.quality for point in found} == {values[name]}
        assert {point.memory_gib for point in found} == {values["memory/weights_gib"]}


def test_every_number_is_in_the_table_to_the_last_digit_of_its_column(tmp_path: Path) -> None:
    rows, values = rows_with_every_metric(tmp_path)
    prepared = prepare(rows)
    cells = {row["key"]: line for row, line in zip(prepared, table_cells(prepared), strict=True)}
    columns = number_columns(prepared)
    assert len(columns) > 15
    for header, column in columns.items():
        task = column.metric.tasks[-1]  # of relative L2 forward: where there is PSNR, that says it better
        number = float(cells[task][header].split()[0])
        unit = {"KiB": 2**20, "MiB": 2**10}.get(header.rpartition(" ")[2], 1)
        last_digit = float(f"1e-{column.metric.digits[1]}") * (1 if "e" not in column.metric.digits else number)
        assert abs(number - values[column.metric.name] * unit) <= last_digit / 2 + 1e-12
        assert number > 0
    assert cells["generate"]["Fréchet distance"].endswith(f"n={values['quality/images']:g}")


# One more file


PAGE = re.compile(r"^`qexp/metrics/mae\.py`\n\n```python\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def mae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metric]:
    """The metric of CONTRIBUTING.md: the registry with one more file in its folder."""
    import qexp.metrics

    folder = tmp_path / "more"
    folder.mkdir()
    page = PAGE.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert page is not None
    (folder / "mae.py").write_text(page["text"], encoding="utf-8")
    monkeypatch.setattr(qexp.metrics, "__path__", [*qexp.metrics.__path__, str(folder)])
    all_metrics.cache_clear()
    yield all_metrics()["quality/mae"]
    sys.modules.pop("qexp.metrics.mae", None)
    monkeypatch.undo()
    all_metrics.cache_clear()


def test_one_file_is_a_metric_everywhere(mae: Metric, tmp_path: Path) -> None:
    import torch

    images = torch.zeros(2, 1, 4, 4)
    assert mae.compute is not None
    offset = torch.tensor([0.125, 0.375]).view(2, 1, 1, 1)
    result = mae.compute(Samples({"images": images}, {"images": images + offset}))
    assert isinstance(result, Result) and (result.value, result.samples) == (0.25, [0.125, 0.375])
    assert "mae" in chosen_metrics()
    metrics = {"memory/weights_gib": 0.004, "quality/mae": result.value}
    folder = run_folder(tmp_path, "a", config(), metrics)
    assert _run_summary(folder)["quality/mae"] == 0.25  # of the run on W&B
    run_folder(tmp_path, "b", config("quanto"), metrics | {"memory/weights_gib": 0.005, "quality/mae": 0.5})
    manifest(tmp_path, "first", [job(0, "a", []), job(1, "b", [])])
    rows = rows_of_sweep(tmp_path, "first")
    assert "MAE" in format_table(rows) and "0.2500" in format_table(rows)
    assert "quality/mae" in results_csv(rows)
    assert mae in plotted_metrics() and file_name(mae) == "pareto_mae.png"
    assert [point.quality for point in points_of(rows, mae)] == [0.25, 0.5]
