import csv
import io
from pathlib import Path

from qexp.report.results_csv import results_csv, varying_settings
from qexp.report.table import rows_of_sweep
from tests.report.factory import GENERATE, ROUNDTRIP, config, job, manifest, run_folder, sweep_of_six


def lines_of(outputs: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(results_csv(rows_of_sweep(outputs, "first")))))


def test_every_metric_and_every_setting_that_varies_is_there(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    lines = lines_of(tmp_path)
    assert len(lines) == 6
    assert set(lines[0]) == {
        "number", "key", "group", "status", "reason", "message", "reused", "seconds", "environment", "backend",
        "offload",
        "components.transformer.backend.quant_method", "components.transformer.backend.label",
        "offload.strategy", "offload.to", *GENERATE,
    }  # fmt: skip
    assert {name: float(lines[3][name]) for name in GENERATE} == GENERATE | {"time/step_ms": 30.0}
    assert lines[3]["backend"] == "bitsandbytes nf4"
    assert lines[3]["offload"] == "leaf→disk"
    assert lines[0]["quality/psnr_db"] == ""  # null: the images are identical
    assert (lines[0]["reused"], lines[3]["reused"]) == ("true", "false")


def test_failures_have_their_reason_and_no_numbers(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    failed, unsupported = lines_of(tmp_path)[4:]
    assert (failed["status"], failed["reason"]) == ("failed", "oom")
    assert failed["message"] == "out of memory:\n needed 9 GiB"
    assert failed["components.transformer.backend.label"] == "int2"
    assert {failed[name] for name in GENERATE} == {""}
    assert (unsupported["status"], unsupported["key"], unsupported["offload.to"]) == ("unsupported", "", "")


def test_settings_that_change_no_result_are_left_out(tmp_path: Path) -> None:
    for key, tags in (("a", ["x"]), ("b", ["y"])):
        container = config(threshold=key)
        container["tracking"]["tags"] = tags
        container["components"]["transformer"]["skip_modules"] = [key, "proj_out"]
        run_folder(tmp_path, key, container, GENERATE)
    manifest(tmp_path, "first", [job(0, "a", []), job(1, "b", [])])
    rows = rows_of_sweep(tmp_path, "first")
    names = ["components.transformer.backend.threshold", "components.transformer.skip_modules"]
    assert varying_settings(rows) == names
    assert lines_of(tmp_path)[1][names[1]] == '["b", "proj_out"]'


def test_metrics_of_both_tasks_stand_side_by_side(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(task="roundtrip"), ROUNDTRIP)
    run_folder(tmp_path, "b", config(), GENERATE)
    manifest(tmp_path, "first", [job(0, "a", []), job(1, "b", [])])
    roundtrip, generate = lines_of(tmp_path)
    assert (roundtrip["roundtrip/sqnr_db_mean"], generate["roundtrip/sqnr_db_mean"]) == ("20.7", "")
    assert list(roundtrip).index("memory/weights_gib") < list(roundtrip).index("quality/psnr_db")
