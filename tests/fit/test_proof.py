"""A whole fit of the embedded models: scores, mixes, proof and answer, as a user runs it."""

import csv
import json
import shlex
from pathlib import Path

import pytest

import qexp
from qexp.fit.__main__ import main

QUICK = ["tracking=none", "isolation=inline", "formats=[packed_uint3,gguf_q4_0,gguf]"]


def proof_of(outputs: Path) -> tuple[dict[str, dict[str, str]], dict[str, object], Path]:
    (path,) = outputs.glob("fit/*/fit.json")
    with (path.parent / "proof.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    return rows, json.loads(path.read_text()), path.parent


@pytest.mark.exhaustive
def test_digits_from_a_budget_to_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=digits", "bits=4.5", "task.num_images=20", "seeds=2", f"paths.outputs={tmp_path}", *QUICK]
    assert main(words) == 0
    shown = capsys.readouterr().out
    rows, fit, folder = proof_of(tmp_path)
    assert {"mix", "qexp_packed uint3wo", "gguf Q4_0"} <= rows.keys() and "gguf Q8_0" not in rows  # 8.5 bits
    recommended = fit["recommended"]
    assert isinstance(recommended, dict)
    best = rows[recommended["name"]]
    assert best["out"] == "" and float(best["bits_per_weight"]) <= 4.5
    for row in rows.values():  # bytes as predicted, and none better than what is recommended
        assert row["predicted_weights_bytes"] == row["weights_bytes"]
        assert row["out"] or float(row["quality/psnr_db"]) <= float(best["quality/psnr_db"])
    # the command line that is printed loads what was proven
    line = next(line for line in shown.splitlines() if line.startswith("  python -m qexp"))
    overrides = dict(word.partition("=")[::2] for word in shlex.split(line)[3:])
    backend = overrides["backend.recipe"] if overrides["backend"] == "mixed" else overrides["backend"]
    assert qexp.memory_footprint(qexp.load("digits", backend, device="cpu")) == int(best["weights_bytes"])
    assert all((folder / name).stat().st_size > 0 for name in ("front.png", "proof.png", "front.csv", "layers.csv"))
    # scores and finished runs are reused
    assert main(words) == 0
    assert "task=sensitivity" not in capsys.readouterr().out


@pytest.mark.exhaustive
def test_quality_of_digits_is_reached_by_the_smallest(tmp_path: Path) -> None:
    words = ["model=digits", "quality=psnr_db>=38", "task.num_images=10", "seeds=1", f"paths.outputs={tmp_path}"]
    assert main([*words, *QUICK]) == 0
    rows, fit, _ = proof_of(tmp_path)
    recommended = fit["recommended"]
    assert isinstance(recommended, dict)
    best = rows[recommended["name"]]
    assert float(best["quality/psnr_db"]) >= 38
    assert all(row["out"] or int(row["weights_bytes"]) >= int(best["weights_bytes"]) for row in rows.values())


@pytest.mark.exhaustive
def test_text_of_the_proof_is_behind_that_of_the_scores(tmp_path: Path) -> None:
    words = ["model=arithmetic", "task=perplexity", "bits=4.5", f"paths.outputs={tmp_path}", *QUICK]
    assert main(words) == 0
    rows, _, folder = proof_of(tmp_path)
    assert float(rows["mix"]["quality/kl_divergence"]) > 0
    whole = (Path(qexp.__file__).parent / "assets" / "arithmetic" / "held_out.txt").read_text()
    rest = (folder / "held_out.txt").read_text()
    assert whole.endswith(rest) and len(whole) - len(rest) >= 32 * 60  # 32 windows were scored, a token a character
