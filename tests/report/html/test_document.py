"""The document of report.html: columns with units and n, the best ones, runs, what is shared, what is damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qexp.report.html.page import render_page
from qexp.results.rows import rows_of_sweep
from tests.report.factory import GENERATE, config, job, manifest, run_folder, sweep_of_seeds, sweep_of_six
from tests.report.html.made_sweeps import document_of, sweep_of_layers, sweep_with_pictures


def column(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in document["columns"] if each["id"] == name]
    return dict(found)


def test_columns_have_the_unit_of_their_values_and_words_for_no_error(tmp_path: Path) -> None:
    document = document_of(tmp_path, sweep_of_six(tmp_path))
    weights = column(document, "memory/weights_gib")
    assert (weights["label"], weights["unit"]) == ("weights", "MiB")
    assert weights["values"] == [4.096, 4.096, 16.384, 16.384, None, None]  # 0.004 and 0.016 GiB, times 1024
    psnr = column(document, "quality/psnr_db")
    assert (psnr["label"], psnr["unit"], psnr["better"]) == ("PSNR", "dB", "higher")
    assert psnr["values"] == [24.5, 24.5, None, None, None, None]
    assert psnr["words"] == {"2": "exact", "3": "exact"}
    assert not column(document, "memory/run_peak_device_gib")["shown"]  # there is no device


def test_seeds_are_one_row_with_their_spread_and_n(tmp_path: Path) -> None:
    document = document_of(tmp_path, sweep_of_seeds(tmp_path))
    psnr = column(document, "quality/psnr_db")
    assert psnr["values"] == [20.0, 25.0]
    assert psnr["spread"] == {"0": 10.0}  # of 10, 20 and 30
    assert psnr["n"] == ["3 seeds", "1 run"]
    assert document["rows"][0]["runs"] == [0, 1, 2, 4]  # the third one stands in the sweep twice
    assert [run["seed"] for run in document["runs"]] == ["0", "1", "2", "0", "2"]
    assert column(document, "backend")["values"] == ["bitsandbytes nf4", "quanto int8"]
    assert column(document, "setting:seed")["values"] == ["0, 1, 2", "0"]


def test_intervals_and_comparisons_stand_at_their_rows(tmp_path: Path) -> None:
    document = document_of(tmp_path, sweep_with_pictures(tmp_path, side=8, images=4), "key09")  # quanto int8
    psnr = column(document, "quality/psnr_db")
    backends = column(document, "backend")["values"]
    row = backends.index("quanto int2")
    low, high = psnr["interval"][str(row)]
    assert psnr["values"][row] - 0.5 < low < psnr["values"][row] < high < psnr["values"][row] + 0.5
    assert psnr["versus"][str(backends.index("quanto int2"))] == "worse"
    assert psnr["n"] == "8 images"
    assert {psnr["versus"][str(row)] for row, name in enumerate(backends) if name == "gguf Q8_0"} == {"better"}


def test_the_best_is_marked_among_the_quantized_and_where_one_stands_out(tmp_path: Path) -> None:
    document = document_of(tmp_path, sweep_with_pictures(tmp_path, side=8, images=4))
    backends = column(document, "backend")["values"]
    assert {backends[row] for row in column(document, "memory/weights_gib")["best"]} == {"quanto int2"}
    assert {backends[row] for row in column(document, "quality/ssim")["best"]} == {"gguf Q8_0"}  # not none, which is 1
    assert column(document, "quality/class_accuracy")["best"] == []  # the same everywhere
    assert column(document, "load/baseline_host_gib")["best"] == []


def test_values_that_depend_on_n_have_no_best_across_different_n(tmp_path: Path) -> None:
    for number, images in enumerate((100, 200, 200)):
        metrics = GENERATE | {"quality/frechet_distance": 1.0 + number, "quality/images": images}
        run_folder(tmp_path, f"key{number}", config("quanto", f"int{number}"), metrics)
    manifest(tmp_path, "first", [job(n, f"key{n}", [f"backend={n}"]) for n in range(3)])
    frechet = column(document_of(tmp_path, "first"), "quality/frechet_distance")
    assert frechet["best"] == []
    assert frechet["n"] == ["100 images", "200 images", "200 images"]


def test_times_of_a_busy_machine_have_no_best(tmp_path: Path) -> None:
    for name, others in (("quiet", 0.0), ("busy", 1.5)):
        for number in range(2):
            metrics = GENERATE | {"time/step_ms": 10.0 + number, "time/other_cores": others}  # of two cores
            run_folder(tmp_path, f"{name}{number}", config("quanto", f"int{number}"), metrics)
        manifest(tmp_path, name, [job(n, f"{name}{n}", [f"backend={n}"]) for n in range(2)])
    assert column(document_of(tmp_path, "quiet"), "time/step_ms")["best"] == [0]
    assert column(document_of(tmp_path, "busy"), "time/step_ms")["best"] == []


def test_failures_keep_their_reason_and_every_run_its_command(tmp_path: Path) -> None:
    document = document_of(tmp_path, sweep_of_six(tmp_path))
    failed = [row for row in document["rows"] if not row["is_done"]]
    assert [(row["status"], row["message"]) for row in failed] == [
        ("failed: oom", "out of memory:\n needed 9 GiB"),
        ("unsupported", "needs a GPU"),
    ]
    outputs = tmp_path.name
    assert document["runs"][2]["command"] == f"python -m qexp rerun {outputs}/runs/key2"
    assert document["runs"][2]["typed"] == "python -m qexp backend=bitsandbytes offload=none"
    assert document["runs"][5]["command"] == "python -m qexp backend=torchao_float8dq"  # it has no folder
    assert document["rows"][0]["folder"] == "../../runs/key2"


def test_runs_hold_what_differs_from_most(tmp_path: Path) -> None:
    document = document_of(tmp_path, sweep_of_six(tmp_path))
    base = document["base"]["config"]
    for run, path in zip(document["runs"][:5], (f"key{number}" for number in range(5)), strict=True):
        stored = json.loads(json.dumps(rows_of_sweep(tmp_path, "first")[int(path[-1])]["config"]))
        found = {**base, **run["config"]}
        backend = stored["components"]["transformer"]["backend"]["quant_method"]
        assert found["components.transformer.backend.quant_method"] == backend
        assert found["offload.strategy"] == stored["offload"]["strategy"]
        assert found["components.transformer.skip_modules"] == '["proj_out"]'
    assert document["runs"][0]["env"] == {}
    assert document["base"]["env"]["torch"] == "2.13.0"
    assert not document["runs"][5]["has_config"]


def test_a_damaged_file_costs_what_it_would_have_shown(tmp_path: Path) -> None:
    sweep_with_pictures(tmp_path, side=8, images=4)
    (tmp_path / "runs/key02/history.csv").write_bytes(b"step,step_ms\n1,\xff\n")
    (tmp_path / "runs/key03/history.csv").write_text("step,step_ms\n1,soon\n")
    (tmp_path / "runs/key04/outputs.safetensors").write_bytes(b"no such thing")
    document = document_of(tmp_path, "pictures")
    assert [warning.partition(":")[0] for warning in document["warnings"]] == [
        str(tmp_path / "runs" / name)
        for name in ("key04/outputs.safetensors", "key02/history.csv", "key03/history.csv")
    ]
    assert len(document["steps"]) == 21
    assert {shot["run"] for shot in document["pictures"]["shots"]} == {*range(23)} - {3}


def test_copied_outputs_make_the_same_document(tmp_path: Path) -> None:
    sweep_with_pictures(tmp_path / "outputs", side=8, images=4)
    shutil.copytree(tmp_path / "outputs", tmp_path / "elsewhere" / "outputs")
    shutil.rmtree(tmp_path / "outputs")
    document = document_of(tmp_path / "elsewhere/outputs", "pictures")
    assert len(document["pictures"]["shots"]) == 23 * 4
    assert document["warnings"] == []


def test_layers_and_scores_are_maps(tmp_path: Path) -> None:
    trips, scores = document_of(tmp_path, sweep_of_layers(tmp_path))["maps"]
    assert trips["rows"][:2] == ["blocks.0.attn.to_q", "blocks.1.attn.to_q"]
    assert trips["values"][0] == ["exact", "exact", "exact"]
    assert trips["values"][1] == [26.0, 26.0, 47.6]  # 6 dB a bit, less 1
    assert [each["label"] for each in scores["columns"]] == ["nf4", "int8"]  # dense is no candidate
    assert scores["values"][0] == [0.1, 0.01]
    assert (scores["unit"], scores["is_log"]) == ("squared error of the output", True)


@pytest.mark.parametrize("started", [True, False])
def test_a_sweep_without_results_has_a_document(tmp_path: Path, started: bool) -> None:
    jobs = [job(1, "", ["backend=nf4"], "failed", reason="config", message="no such backend")] if started else []
    manifest(tmp_path, "first", jobs)
    document = document_of(tmp_path, "first")
    assert len(document["rows"]) == len(jobs)
    assert document["plot"]["x"] == ""
    assert render_page(document).count("<section") == 2 * len(jobs)  # results, failures
