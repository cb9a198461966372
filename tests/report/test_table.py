import re
from pathlib import Path

import pytest

from qexp.errors import ConfigError, DiskError
from qexp.report.__main__ import main
from qexp.report.selection import select
from qexp.report.table import format_table, rows_of_sweep
from qexp.results.labels import run_label
from tests.report.factory import GENERATE, ROUNDTRIP, config, job, manifest, run_folder, sweep_of_six

pytestmark = pytest.mark.usefixtures("drawn_once")


def table_of(outputs: Path) -> list[list[str]]:
    """Second line of the header and the rows as words: columns are at least two spaces apart."""
    lines = format_table(rows_of_sweep(outputs, "first")).split("\n\n")[0].splitlines()
    return [[word.strip() for word in line.split("  ") if word.strip()] for line in [lines[1], *lines[3:]]]


def test_rows_hold_what_the_run_folders_say(tmp_path: Path) -> None:
    rows = rows_of_sweep(tmp_path, sweep_of_six(tmp_path))
    assert [row["label"] for row in rows[:4]] == [
        "digits · none · none · generate",
        "digits · none · leaf→disk · generate",
        "digits · bitsandbytes nf4 · none · generate",
        "digits · bitsandbytes nf4 · leaf→disk · generate",
    ]
    assert rows[2]["metrics"] == GENERATE
    assert rows[2]["env"]["host"] == "bench-1"
    assert rows[2]["config"] == config("bitsandbytes", "nf4", "none")
    assert (rows[4]["status"], rows[4]["reason"]) == ("failed", "oom")
    assert "9 GiB" in rows[4]["message"]  # the run folder is newer than the manifest
    assert (rows[5]["status"], rows[5]["folder"], rows[5]["label"]) == ("unsupported", None, "backend=torchao_float8dq")


@pytest.mark.parametrize(("blocks", "label"), [(1, "block→cpu"), (2, "block×2→cpu"), (16, "block×16→cpu")])
def test_labels_have_the_number_of_blocks_that_travel_together(blocks: int, label: str) -> None:
    offload = {"strategy": "block", "to": "cpu", "num_blocks_per_group": blocks}
    assert run_label(config("none", None) | {"offload": offload}) == f"digits · none · {label} · generate"


def test_a_deleted_run_is_shown_as_missing(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    (tmp_path / "runs/key2/result.json").unlink()
    (tmp_path / "runs/key3").rename(tmp_path / "elsewhere")
    rows = rows_of_sweep(tmp_path, "first")
    assert [row["status"] for row in rows] == ["done", "done", "missing", "missing", "failed", "unsupported"]
    for name in ("key2/result.json", "key3"):
        assert f"{tmp_path / 'runs' / name} is gone; run" in " ".join(format_table(rows).split())


DAMAGED = {"result.json": '{"schema": 1, ', "status.json": "[]", "config.yaml": "a: [", "env": '{"metrics": {}}'}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_costs_its_own_row(file: str, tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    (tmp_path / "runs/key2" / file.replace("env", "result.json")).write_text(DAMAGED[file])
    rows = rows_of_sweep(tmp_path, "first")
    assert [row["status"] for row in rows] == ["done", "done", "damaged", "done", "failed", "unsupported"]
    text = format_table(rows)
    assert "#2" in text and "runs/key2" in text
    assert main(["first", "--outputs", str(tmp_path)]) == 0
    assert "damaged" in (tmp_path / "sweeps/first/report.md").read_text()


OF_ANOTHER_SHAPE = [
    ("result.json", '{"metrics": {}, "env": null}'),
    ("config.yaml", "model: {source: digits}\ncomponents: []"),
    ("config.yaml", "model: {source: digits}\ncomponents: {transformer: null}"),
]


@pytest.mark.parametrize(("file", "content"), OF_ANOTHER_SHAPE)
def test_a_file_of_another_shape_costs_its_own_row(file: str, content: str, tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), GENERATE)
    (run_folder(tmp_path, "b", config(), GENERATE) / file).write_text(content)
    manifest(tmp_path, "first", [job(0, "a", []), job(1, "b", [])])
    assert [row["status"] for row in rows_of_sweep(tmp_path, "first")] == ["done", "damaged"]


def test_a_damaged_manifest_of_another_sweep_does_not_matter(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    (manifest(tmp_path, "older", []) / "manifest.json").write_text("{")
    assert select(tmp_path).title == "first"
    with pytest.raises(DiskError, match="older"):
        rows_of_sweep(tmp_path, "older")


def test_what_is_not_finite_says_so(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), GENERATE | {"quality/psnr_db": None, "quality/finite": 0.0})
    manifest(tmp_path, "first", [job(0, "a", [])])
    assert "not finite" in table_of(tmp_path)[1]


def test_the_frechet_distance_is_shown_where_there_is_room(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(), GENERATE | {"quality/frechet_distance": 1.234})
    manifest(tmp_path, "first", [job(0, "a", [])])
    rows = rows_of_sweep(tmp_path, "first")
    assert "Fréchet" in format_table(rows) and "1.23" in format_table(rows)
    assert "Fréchet" not in format_table([row | {"label": "x" * 60} for row in rows])


def test_table_is_sorted_by_memory_with_failures_last(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    header, *lines = [" | ".join(words) for words in table_of(tmp_path)]
    assert header == "# | backend | offload | status | MiB | weight | MiB | MiB | ms | dB | SSIM | acc."
    assert lines == [
        "2 | bitsandbytes nf4 | none | done | 4.10 | 4.50 | 30.7 | 20.5 | 12.0 | 24.50 | 0.9100 | 0.930",  # 0.004 GiB
        "3 | bitsandbytes nf4 | leaf→disk | done | 4.10 | 4.50 | 30.7 | 20.5 | 30.0 | 24.50 | 0.9100 | 0.930",
        "0 | none | none | reused | 16.38 | 32.00 | 30.7 | 20.5 | 12.0 | exact | 0.9100 | 0.930",
        "1 | none | leaf→disk | done | 16.38 | 32.00 | 30.7 | 20.5 | 12.0 | exact | 0.9100 | 0.930",
        "4 | quanto int2 | none | failed: oom",
        "5 | backend=torchao_float8dq | unsupported",
    ]


def test_failures_are_listed_with_their_reasons(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    below = format_table(rows_of_sweep(tmp_path, "first")).split("\n\n")[1]
    assert below.splitlines() == [
        "#4 digits · quanto int2 · none · generate: failed: oom: out of memory: needed 9 GiB",
        "#5 backend=torchao_float8dq: unsupported: needs a GPU",
    ]


def test_roundtrip_shows_sqnr_and_no_empty_column(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", config(task="roundtrip"), ROUNDTRIP)
    manifest(tmp_path, "first", [job(0, "a", ["task=roundtrip"])])
    header, line = table_of(tmp_path)
    assert header == ["#", "backend", "offload", "status", "MiB", "weight", "dB", "min", "error"]
    assert line[-3:] == ["20.70", "19.90", "1.20e-02"]


def test_a_lossless_roundtrip_is_exact_and_an_undefined_one_is_empty(tmp_path: Path) -> None:
    nothing = {"roundtrip/sqnr_db_mean": None, "roundtrip/sqnr_db_min": None}
    counts = {"roundtrip/layers": 3, "roundtrip/exact_layers": 3, "roundtrip/max_abs_error": 0.0}
    run_folder(tmp_path, "a", config("none", task="roundtrip"), ROUNDTRIP | nothing | counts)
    broken = counts | {"roundtrip/exact_layers": 2}  # the third layer is not finite, and has no error to take part
    run_folder(tmp_path, "b", config(task="roundtrip"), ROUNDTRIP | nothing | broken)
    manifest(tmp_path, "first", [job(0, "a", []), job(1, "b", [])])
    _, exact, undefined = table_of(tmp_path)
    assert exact[-3:] == ["exact", "exact", "0.00e+00"]
    assert undefined[-2:] == ["4.50", "0.00e+00"]  # bits per weight, then nothing


def test_what_else_was_varied_gets_a_column(tmp_path: Path) -> None:
    jobs = []
    for number, threshold in enumerate((0, 6)):
        run_folder(tmp_path, f"k{number}", config("bitsandbytes", "llm.int8", llm_int8_threshold=threshold), GENERATE)
        jobs.append(
            job(
                number, f"k{number}", ["backend=bitsandbytes_int8", f"backend.llm_int8_threshold={threshold}", "seed=1"]
            )
        )
    manifest(tmp_path, "first", jobs)
    header, *lines = table_of(tmp_path)
    assert header[3] == "setting"
    assert [line[3] for line in lines] == ["llm_int8_threshold=0", "llm_int8_threshold=6"]


def test_settings_that_find_no_room_are_below_the_table(tmp_path: Path) -> None:
    settings = [f"skip_modules=[{'x' * 70},{'y' * n}]" for n in (20, 21)]
    for number in range(2):
        run_folder(tmp_path, f"k{number}", config(label=f"nf{number}"), GENERATE)
    run_folder(tmp_path, "k2", config(), None, "failed", "oom", "too big")
    overrides = [[settings[0], "seed=1"], [settings[1], "seed=1"], ["seed=2"]]
    manifest(tmp_path, "first", [job(number, f"k{number}", each) for number, each in enumerate(overrides)])
    text = format_table(rows_of_sweep(tmp_path, "first")).splitlines()
    assert [line for line in text if line.startswith(("#0", "#1"))] == [f"#{n}: {settings[n]}, seed=1" for n in (0, 1)]
    assert [line for line in text if line.startswith("#2")] == [
        "#2 digits · bitsandbytes nf4 · none · generate · seed=2: failed: oom: too big"
    ]


def test_table_fits_120_columns_and_keeps_numbers_whole(tmp_path: Path) -> None:
    jobs = []
    for number in range(2):
        container = config("bitsandbytes", "a very long label for a backend that somebody wrote into a yaml", "block")
        run_folder(tmp_path, f"k{number}", container, GENERATE | {"memory/run_peak_device_gib": 1.5})
        override = f"backend.some_long_field_name_{'x' * 60}={number}"
        jobs.append(job(number, f"k{number}", [override], message="word " * 100, status="done"))
    run_folder(tmp_path, "k2", config(), None, "failed", "error", "word " * 100)
    manifest(tmp_path, "first", [*jobs, job(2, "k2", [], "failed")])
    text = format_table(rows_of_sweep(tmp_path, "first"))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert text.count("…") >= 3
    assert re.search(r"device.*\n.* GiB", text) and len(re.findall(r" 1\.5 ", text)) == 2  # on the device


def test_a_run_whose_process_died_is_shown_as_failed(tmp_path: Path) -> None:
    sweep_of_six(tmp_path)
    status = tmp_path / "runs/key2/status.json"
    status.write_text(
        status.read_text().replace('"done"', '"running"').replace('"pid": 1', '"pid": 4194305')
    )  # > pid_max
    assert "failed: signal" in format_table(rows_of_sweep(tmp_path, "first"))


def test_sweeps_are_found_by_name_or_the_latest(tmp_path: Path) -> None:
    manifest(tmp_path, "zebra", [], started="2026-01-01T00:00:00")
    manifest(tmp_path, "alpha", [], started="2026-01-03T00:00:00")
    assert select(tmp_path).title == "alpha"
    assert select(tmp_path, ["zebra"]).title == "zebra"
    with pytest.raises(ConfigError, match=r"'zebar' is not in .*sweeps \(did you mean zebra\?\); use alpha or zebra"):
        select(tmp_path, ["zebar"])
    with pytest.raises(ConfigError, match="holds no sweep"):
        select(tmp_path / "empty")
    assert format_table(rows_of_sweep(tmp_path, "alpha")) == "no experiments"
