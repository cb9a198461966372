"""Who wins: bounds are hard on what was measured, the best of all is recommended, ties are said to be."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from qexp.errors import ConfigError
from qexp.fit.additivity import Additivity, measure_additivity, random_mixes
from qexp.fit.budget import Size
from qexp.fit.contestants import Contestant
from qexp.fit.mix import Mix
from qexp.fit.proof import Proven, compared_metric
from qexp.fit.request import read_request
from qexp.fit.verdict import decide
from qexp.metrics.registry import all_metrics
from tests.fit.test_program import made_groups

PSNR, KL = all_metrics()["quality/psnr_db"], all_metrics()["quality/kl_divergence"]
SIZE = Size(fixed=1000, numel=8000, beside=0)
NOISE = random.Random(0)
IMAGES = [NOISE.gauss(40, 5) for _ in range(60)]  # some images are harder for every format


def proven(
    name: str,
    shift: float,
    nbytes: int,
    metric: str = "quality/psnr_db",
    kind: Literal["mix", "uniform", "rule"] = "uniform",
    spread: float = 0.1,
) -> Proven:
    values = {("1", f"image {n}"): (image + shift + NOISE.gauss(0, spread), 1.0) for n, image in enumerate(IMAGES)}
    return Proven(Contestant(name, kind, Mix(()), ()), {metric: values}, nbytes, nbytes + 500, 10.0)


def test_best_of_all_is_recommended_though_it_is_uniform() -> None:
    found = decide([proven("mix", 0, 4000, kind="mix"), proven("q4", 1, 4500)], PSNR, read_request(["bits=4"]), SIZE)
    assert found.best.contestant.name == "q4" and not found.undecided
    ((other, comparison),) = found.against
    assert other.contestant.name == "mix" and comparison.verdict == "better"
    assert comparison.difference == pytest.approx(1, abs=0.1)


def test_lower_is_better_of_a_divergence() -> None:
    rows = [proven("mix", -1, 4000, KL.name), proven("q4", 0, 4500, KL.name)]
    assert decide(rows, KL, read_request(["bits=4"]), SIZE).best.contestant.name == "mix"


def test_settings_whose_difference_is_noise_are_not_decided() -> None:
    rows = [proven("mix", 0, 4000, spread=1), proven("q4", 0, 4500, spread=1), proven("q2", -9, 3000)]
    found = decide(rows, PSNR, read_request(["bits=4"]), SIZE)
    assert len(found.undecided) == 1 and found.undecided[0] in ("mix", "q4")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["weights=4200B"], "its loaded weights take"),
        (["bits=3.3"], "bits a weight as loaded"),
        (["memory=4700B"], "its measured peak is"),
        (["memory=1GiB", "step_ms=9"], "a step takes 10 ms"),
    ],
)
def test_what_was_measured_over_a_bound_is_never_recommended(words: list[str], why: str) -> None:
    over, within = proven("q5", 5, 4400), replace(proven("q4", 0, 4000), step_ms=5.0)
    found = decide([over, within], PSNR, read_request(words), SIZE)
    assert found.best is within and why in found.over["q5"]
    with pytest.raises(ConfigError, match="nothing that was run keeps it: q5"):
        decide([over], PSNR, read_request(words), SIZE)


def test_quality_recommends_the_smallest_that_reaches_it() -> None:
    rows = [proven("q8", 9, 8000), proven("q4", 2, 4500), proven("q2", -3, 3000)]
    found = decide(rows, PSNR, read_request(["quality=psnr_db>=40"]), SIZE)
    assert found.best.contestant.name == "q4" and "psnr_db is" in found.over["q2"]


def test_failed_runs_are_out_with_their_reason() -> None:
    failed = Proven(Contestant("torchao", "uniform", Mix(()), ()), problem="failed: no kernel")
    found = decide([failed, proven("q4", 0, 4000)], PSNR, read_request(["bits=4"]), SIZE)
    assert found.over == {"torchao": "failed: no kernel"}
    with pytest.raises(ConfigError, match="nothing is proven"):
        compared_metric([failed], None)


def test_metric_that_decides_is_one_that_all_have() -> None:
    both = replace(proven("a", 0, 1), samples={PSNR.name: {}, "quality/relative_l2": {}})
    assert compared_metric([both, proven("b", 0, 1)], None) is PSNR
    with pytest.raises(ConfigError, match="no samples of it"):
        compared_metric([both], KL)


def test_scores_that_add_up_are_told_from_those_that_do_not() -> None:
    # by hand: ranks 1 2 3 4 against 1 2 4 3: 1 - 6·2 / (4·15) = 0.8
    swapped = Additivity((1.0, 2.0, 3.0, 4.0), (1.1, 2.2, 4.4, 3.9))
    assert swapped.spearman == pytest.approx(0.8) and not swapped.holds and "do not add up" in str(swapped)
    exact = Additivity((1.0, 2.0, 3.0), (2.0, 4.0, 6.0))
    assert exact.holds and exact.ratio == 2


def test_random_mixes_differ_and_leave_no_layer_dense() -> None:
    mixes = random_mixes(made_groups(12, 0))
    assert len(mixes) == 8 and len({tuple(choice.format for choice in mix.choices) for mix in mixes}) == 8
    assert all("none" not in mix.formats for mix in mixes)
    assert mixes[0].score > mixes[-1].score


def test_folder_of_scores_may_be_named_by_a_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.csv").write_text("")
    assert read_request(["bits=4", f"scores={tmp_path / 'sensitivity.csv'}"]).scores == tmp_path


def test_peak_that_was_not_measured_keeps_no_bound() -> None:
    unknown = replace(proven("q4", 0, 4000), peak_bytes=0)
    with pytest.raises(ConfigError, match="its peak was not measured; use isolation=process"):
        decide([unknown], PSNR, read_request(["memory=1GiB"]), SIZE)


def test_error_of_images_is_the_geometric_mean_over_samples(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    run, reference = tmp_path / "runs" / "a", tmp_path / "references" / "r"
    for folder in (run, reference):
        folder.mkdir(parents=True)
    states = torch.zeros(3, 2, 5)  # [steps, samples, values]
    save_file({"trajectory": states}, reference / "outputs.safetensors")
    states[2, 0], states[2, 1] = 1.0, 10.0
    save_file({"trajectory": states}, run / "outputs.safetensors")
    (run / "result.json").write_text('{"reference": "r"}')
    one = replace(proven("mix", 0, 1), folders=(run,))
    found = measure_additivity([one] * 3, "squared_error")
    assert found.measured[0] == pytest.approx(10.0)  # of 1 and 100: no sample decides alone
    failed = replace(one, problem="out of memory")
    with pytest.raises(ConfigError, match=r"2 of 4 random mixes ran, .* the first that failed: out of memory"):
        measure_additivity([one, failed, one, failed], "squared_error")


def test_time_of_a_step_leaves_less_to_travel(tmp_path: Path) -> None:
    from qexp.fit.layers import ComponentLayers, ModelLayers
    from qexp.fit.plan import FitPlan, within
    from qexp.fit.program import Limits
    from qexp.sensitivity.table import Header, SensitivityTable

    layers = ComponentLayers(100, {"a": "a.weight"}, {"a.weight": 100}, {"a.weight": 50}, {"a": 0}, {}, ("a",))
    model = ModelLayers({"m": layers}, 0, 0, {}, {})
    groups = [model.candidates("m", ("a",), ())]
    header = Header({"m": ""}, "m", "exact", "kl", "", 1, {"m": 0}, (), {})
    request = read_request(["memory=1GiB", "step_ms=80", "bandwidth=1GB/s"])
    plan = FitPlan(model, groups, SIZE, Limits(0), SensitivityTable(header, ()), tmp_path, 1e9)
    assert within(plan, request).limits.travel_bytes == 80_000_000
    measured = within(plan, request, 30.0)
    assert measured.limits.travel_bytes == within(measured, request).limits.travel_bytes == 50_000_000
    assert within(plan, request, 90.0).limits.travel_bytes == 0
