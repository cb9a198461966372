"""The benchmark of fits: what it makes of a proof's table."""

import pytest
from bench_fit import markdown, summary

FIT = {
    "recommended": {"name": "mix", "undecided": [], "metric": "quality/psnr_db"},
    "additivity": {"spearman": 0.99},
    "predicted": {"weights_bytes": 10},
    "measured": {"weights_bytes": 10},
}


def row(name: str, kind: str, bits: float, value: float, metric: str, out: str = "") -> dict[str, str]:
    return {"name": name, "kind": kind, "bits_per_weight": str(bits), metric: repr(value), "out": out}


def test_gain_is_over_the_best_uniform_format_that_fits() -> None:
    name = "quality/psnr_db"
    proof = [
        row("mix", "mix", 4.5, 41.5, name),
        row("q4", "uniform", 4.5, 38.0, name),
        row("q3", "uniform", 3.5, 30.0, name),
        row("q5", "uniform", 5.5, 44.0, name, out="its layers take 5.5 bits"),
        row("none", "uniform", 16, float("inf"), name),
    ]
    found = summary(proof, name, FIT)
    assert found["gain"] == 3.5 and found["uniform"]["name"] == "q4" and found["rule"] is None
    line = markdown([{"model": "digits", "bits": 4.5, **found}]).splitlines()[-1]
    assert line == "| digits | 4.5 | q4 | 38.0 dB | – | 41.5 | +3.5 dB | mix | 0.990 |"


def test_gain_of_a_divergence_is_the_share_that_is_gone() -> None:
    name = "quality/kl_divergence"
    proof = [
        row("mix", "mix", 4.5, 0.004, name),
        row("q4", "uniform", 4.5, 0.01, name),
        row("hand", "rule", 4.4, 0.009, name),
    ]
    found = summary(proof, name, FIT)
    assert found["gain"] == pytest.approx(60)  # percent
    assert "| -60 % KL |" in markdown([{"model": "arithmetic", "bits": 4.5, **found}])
