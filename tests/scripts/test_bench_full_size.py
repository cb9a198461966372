"""The benchmark at full size: its program on a checkpoint of no size, and what it makes of the results."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_full_size import failures, merged
from benching import run_watched
from make_checkpoint import write_checkpoint

from tests.predict.test_predict import T5, TRANSFORMER

PROGRAM = Path(__file__).parents[2] / "scripts" / "bench_full_size_program.py"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("config", "name"), [(TRANSFORMER, "torchao int4wo"), (T5, "int8")])
def test_a_process_is_watched_through_load_and_forward(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    write_checkpoint(tmp_path / "model", config, 2)
    place = str(tmp_path / "model")
    run = run_watched([sys.executable, str(PROGRAM), name, place, place, "--image-tokens", "16", "--text-tokens", "8"])
    assert run["finite"] and run["answer_std"] > 0
    assert run["weights_bytes"] > 0 and run["load_seconds"] > 0 and run["forward_seconds"] > 0
    assert run["loaded_peak_total_bytes"] <= run["peak_total_bytes"]


def row(name: str = "nf4", peak_gib: float = 7.0, finite: bool = True) -> dict[str, Any]:
    return {"component": "transformer", "format": name, "peak_total_bytes": int(peak_gib * 2**30), "finite": finite}


def test_answers_and_the_peak_of_nf4_are_judged() -> None:
    assert failures([row(), row("gguf Q4_0", 9)], 1.0) == []
    assert failures([row(peak_gib=8)], 1.0) == ["nf4 took 8.00 GiB, above 7.5"]
    assert failures([row(peak_gib=8)], 0.5) == []
    assert failures([row(finite=False)], 1.0) == ["transformer nf4: the answer is not finite"]


def test_rows_of_other_formats_stay(tmp_path: Path) -> None:
    path, options = tmp_path / "full_size.json", {"fraction": 1.0}
    assert merged([row()], path, options) == [row()]
    path.write_text(json.dumps({"options": options, "rows": [row("nf4", 6), row("int8")]}))
    assert merged([row()], path, options) == [row("int8"), row()]
    assert merged([row()], path, {"fraction": 0.5}) == [row()]
