"""Scores of small networks: exact ones against a computation of their own, gradients against these."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError
from qexp.loading.lifecycle import request_load
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.gguf import GGUFConfig
from qexp.quantizers.gguf_blocks.encode import ENCODERS
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.qexp_packed import PackedConfig
from qexp.quantizers.rows import WeightSpec
from qexp.results.run_folder import PARTIAL
from qexp.sensitivity import exact, gradient
from qexp.sensitivity.blocks import Tail, blocks_of, order_of_calls
from qexp.sensitivity.candidates import restored_rows
from qexp.sensitivity.errors import draw_projection, output_error
from qexp.sensitivity.exact import score_exactly
from qexp.sensitivity.gradient import passes_of, score_by_gradient
from qexp.sensitivity.groups import ComponentGroups, Format, plan_groups
from qexp.sensitivity.partial import PartialScores
from qexp.sensitivity.samples import Batch, merge_calls
from qexp.tasks.sensitivity import SensitivityConfig
from tests.backends import CPU, Stack, StackSource, backend_config, save_stack

FORMATS = ["gguf", "gguf_q4_0"]
SHAPES = [(64, 64), (96, 64), (32, 96)]


def planned(folder: Path, **task: Any) -> ComponentGroups:
    request = request_load(StackSource(folder), "stack", ComponentConfig(backend_config("none")), device=CPU)
    return plan_groups(request, SensitivityConfig(**{"formats": FORMATS, **task}))


def batches_of(*rows: int, weight: float = 0.5) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    return [Batch((torch.randn(n, 5, 64, generator=random),), {}, torch.full((n,), weight)) for n in rows]


def scored(model: Any, groups: ComponentGroups, batches: list[Batch], folder: Path, lists: Any = ("layers",)) -> Any:
    partial = PartialScores(folder, {}, 6, anew=True)
    return score_exactly("stack", model, groups, batches, "squared_error", lists, partial)


def decoded(weight: Tensor, name: str) -> Tensor:
    """What gguf-py makes of a weight."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind).copy())


def test_exact_scores_are_the_weighted_error_with_one_layer_quantized(tmp_path: Path) -> None:
    model: Any = save_stack(tmp_path, SHAPES, dtype=torch.float32)
    batches = batches_of(3, 2)
    found = scored(model, planned(tmp_path), batches, tmp_path)
    weights = [layer.weight.clone() for layer in model.layers]
    for number, layer in enumerate(model.layers):
        for name in ("Q8_0", "Q4_0"):
            expected = 0.0
            for batch in batches:
                outputs = []
                for changed in (weights[number], decoded(weights[number], name)):
                    own = [*weights[:number], changed, *weights[number + 1 :]]
                    x = batch.args[0]
                    for weight, other in zip(own, model.layers, strict=True):
                        x = x @ weight.T + other.bias
                    outputs.append(x)
                expected += 0.5 * float((outputs[1] - outputs[0]).square().sum())
            assert found[f"layers.{number}"][f"gguf {name}"] == pytest.approx(expected, rel=1e-3)
        assert torch.equal(layer.weight, weights[number])  # the dense weight is back


def test_scores_do_not_depend_on_where_the_forward_pass_begins(tmp_path: Path) -> None:
    model, groups, batches = save_stack(tmp_path, SHAPES, dtype=torch.float32), planned(tmp_path), batches_of(3)
    assert scored(model, groups, batches, tmp_path) == scored(model, groups, batches, tmp_path, ())


def test_a_block_is_skipped_only_if_it_ended_before_the_layer_began(tmp_path: Path) -> None:
    model: Any = save_stack(tmp_path, SHAPES, dtype=torch.float32)
    batches = batches_of(3)
    blocks, starts = order_of_calls(model, blocks_of(model, ["layers"]), ["layers.0", "layers.2"], batches[0])
    assert (blocks, starts) == (list(model.layers), {"layers.0": 0, "layers.2": 2})
    tail = Tail(model, blocks, batches)
    assert tail.check(2)
    with torch.no_grad():
        model.layers[1].bias.add_(1)
    assert torch.equal(tail.run(2, 0), tail.outputs[0])  # it was not computed
    assert not torch.equal(tail.run(1, 0), tail.outputs[0])


@pytest.mark.parametrize("lists", [(), ("layers",)])
def test_gradient_scores_have_the_mean_of_exact_ones(tmp_path: Path, lists: tuple[str, ...]) -> None:
    model, groups, batches = save_stack(tmp_path, SHAPES, dtype=torch.float32), planned(tmp_path), batches_of(3, 2)
    expected = scored(model, groups, batches, tmp_path)
    passes = passes_of(model, batches, 400)
    assert [len(batch.weights) for batch in passes] == [1200, 800]  # one pass for all projections
    partial = PartialScores(tmp_path, {}, 12, anew=True)
    found = score_by_gradient("stack", model, groups, passes, 400, "squared_error", lists, partial)
    for layer, scores in expected.items():
        for name, score in scores.items():  # 2000 squares of a Gaussian: a deviation of sqrt(2 / 2000) = 3 %
            assert found[layer][name] == pytest.approx(score, rel=0.12)


def test_gradient_scores_do_not_depend_on_how_much_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats of rows meet a few rows at a time; nf4, whose second scales are of the whole weight, meets all."""
    formats = [*FORMATS, "packed_uint4", "bitsandbytes_nf4_dq"]
    model, groups = save_stack(tmp_path, SHAPES, dtype=torch.float32), planned(tmp_path, formats=formats)
    passes = passes_of(model, batches_of(3, 2), 4)

    def found() -> Any:
        partial = PartialScores(tmp_path, {}, 24, anew=True)
        return score_by_gradient("stack", model, groups, passes, 4, "squared_error", (), partial)

    expected = found()
    monkeypatch.setattr(gradient, "CHANGES_BYTES", 4 * 64 * 7 * 3)  # 7 of 96 rows of 64 weights, in three formats
    monkeypatch.setattr(gradient, "GRADIENTS_BYTES", 4 * 64 * 20 * 2)
    for layer, scores in found().items():
        assert scores == pytest.approx(expected[layer], rel=1e-4) and min(scores.values()) > 0


def test_rows_that_are_quantized_alone_are_as_in_the_whole_weight() -> None:
    weight, spec = torch.randn(9, 256), WeightSpec("layer", (9, 256), torch.float32)
    packed = [PackedConfig(quant_type=name, group_size=size) for name in ELEMENTS for size in (32, None)]
    for config in (*packed, *(GGUFConfig(quant_type=name) for name in ENCODERS)):
        one = Format("", config, load_quantizer(config), {"layer": spec})
        assert one.quantizer.rows_alone
        assert torch.equal(restored_rows(weight[3:5], spec, one), restored_rows(weight, spec, one)[3:5])


def test_layers_of_a_group_are_changed_together(tmp_path: Path) -> None:
    model, batches = save_stack(tmp_path, SHAPES, dtype=torch.float32), batches_of(4)
    groups = planned(tmp_path, groups=[["0", "1"]])
    assert [group.layers for group in groups.groups] == [("layers.0", "layers.1"), ("layers.2",)]
    alone = planned(tmp_path)
    assert groups.groups[0].nbytes["gguf Q4_0"] == sum(group.nbytes["gguf Q4_0"] for group in alone.groups[:2])
    expected = scored(model, groups, batches, tmp_path)["layers.0"]["gguf Q4_0"]
    apart = scored(model, alone, batches, tmp_path)
    assert expected != pytest.approx(apart["layers.0"]["gguf Q4_0"] + apart["layers.1"]["gguf Q4_0"], rel=1e-3)
    partial = PartialScores(tmp_path, {}, 4, anew=True)
    passes = passes_of(model, batches, 500)
    found = score_by_gradient("stack", model, groups, passes, 500, "squared_error", ["layers"], partial)
    assert found["layers.0"]["gguf Q4_0"] == pytest.approx(expected, rel=0.12)


def test_kl_is_torchs_and_projections_estimate_it() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 16, generator=random)
    change = 0.01 * torch.randn(2, 3, 16, generator=random)
    weights = torch.tensor([0.25, 0.5])
    own, other = logits.log_softmax(-1), (logits + change).log_softmax(-1)
    each = nn.functional.kl_div(other, own, reduction="none", log_target=True).sum((1, 2))
    expected = float((each * weights).sum())
    assert output_error("kl", logits, logits + change, weights) == pytest.approx(expected, rel=1e-2)
    draws = [draw_projection("kl", logits, weights, random) for _ in range(3000)]
    squares = np.mean([float((v * change).flatten(1).sum(1).square().sum()) for v in draws])
    assert squares == pytest.approx(expected, rel=0.1)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups, batches = save_stack(tmp_path, SHAPES, dtype=torch.float32), planned(tmp_path), batches_of(3)
    expected, made = scored(model, groups, batches, tmp_path), list[str]()
    real = exact.candidate_weight

    def candidate(weight: Tensor, layer: str, one: Any) -> Tensor:
        made.append(layer)
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(weight, layer, one)

    monkeypatch.setattr(exact, "candidate_weight", candidate)
    with pytest.raises(KeyboardInterrupt):
        scored(model, groups, batches, tmp_path)
    with (tmp_path / PARTIAL).open("a", encoding="utf-8") as stream:
        stream.write('["stack", "layers.1", {"gguf Q8')  # cut off by the kill
    found = score_exactly("stack", model, groups, batches, "squared_error", (), PartialScores(tmp_path, {}, 6))
    assert (found, made[4:]) == (expected, ["layers.1"] * 2 + ["layers.2"] * 2)
    assert not PartialScores(tmp_path, {"torch": "another"}, 6).done


def test_calls_are_joined_only_where_the_network_gives_the_same() -> None:
    class Centered(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return (x - x.mean(0)) * scale  # rows depend on each other

    class Apart(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale

    batches = [Batch((b.args[0],), {"scale": torch.tensor(2.0)}, b.weights) for b in batches_of(3, 2)]
    (one,) = merge_calls(Apart(), batches)
    assert torch.equal(one.args[0], torch.cat([batch.args[0] for batch in batches]))
    assert merge_calls(Centered(), batches) == batches
    other = [batches[0], Batch(batches[1].args, {"scale": torch.tensor(3.0)}, batches[1].weights)]
    assert merge_calls(Apart(), other) == other


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"groups": [["0", "9"]]}, r"task\.groups\[0\].*'\*\*\.9' matches no layer with a format"),
        ({"groups": ["layers.2"]}, r"task\.groups\[0\].*puts no two layers together"),
        ({"formats": ["packed_uint4"]}, r"no layer of 'stack' can be in qexp_packed uint4wo .*does not divide"),
    ],
)
def test_what_cannot_be_scored_is_refused_from_headers(tmp_path: Path, task: dict[str, Any], said: str) -> None:
    save_stack(tmp_path, [(32, 96), (32, 32), (32, 32)], dtype=torch.float32)
    with pytest.raises(ConfigError, match=said):
        planned(tmp_path, **task)


def test_a_format_is_tried_only_where_it_fits(tmp_path: Path) -> None:
    model: Stack = save_stack(tmp_path, [(64, 48), (64, 64)], dtype=torch.bfloat16)
    groups = planned(tmp_path)
    assert [group.name for group in groups.groups] == ["layers.1"]  # blocks of 32 do not divide 48
    assert groups.groups[0].nbytes == {"none": 64 * 64 * 2, "gguf Q8_0": 64 * 2 * 34, "gguf Q4_0": 64 * 2 * 18}
    everything = sum(parameter.nbytes for parameter in model.parameters())
    assert groups.fixed_bytes == everything - 64 * 64 * 2


def test_scores_around_a_base_are_what_a_format_adds_there(tmp_path: Path) -> None:
    model: Any = save_stack(tmp_path, SHAPES, dtype=torch.float32)
    batches, groups = batches_of(3), planned(tmp_path)
    partial = PartialScores(tmp_path, {}, 6, anew=True)
    found = score_exactly("stack", model, groups, batches, "squared_error", ["layers"], partial, "gguf Q4_0")
    weights = [layer.weight.clone() for layer in model.layers]
    low = [decoded(weight, "Q4_0") for weight in weights]

    def output(own: list[Tensor]) -> Tensor:
        x = batches[0].args[0]
        for weight, layer in zip(own, model.layers, strict=True):
            x = x @ weight.T + layer.bias
        return x

    def error(number: int, weight: Tensor) -> float:
        own = [*low[:number], weight, *low[number + 1 :]]
        return 0.5 * float((output(own) - output(weights)).square().sum())

    for number, weight in enumerate(weights):
        for name in ("Q8_0", "Q4_0"):
            expected = max(error(number, decoded(weight, name)) - error(number, weight), 0.0)
            assert found[f"layers.{number}"][f"gguf {name}"] == pytest.approx(expected, rel=2e-3, abs=1e-2)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.layers, weights, strict=True))


def test_layers_that_no_sample_reaches_have_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qexp.experiments.sensitivity import unreached_groups

    model: Any = save_stack(tmp_path, [(64, 64), (64, 64), (64, 64)], dtype=torch.float32)
    model.layers[1].weight.zero_()  # no format changes it: it costs nothing, and is reached
    groups, batches = planned(tmp_path), batches_of(2)
    del model.layers[2]
    unused = nn.Linear(64, 64).requires_grad_(False)
    model.layers.append(unused)
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    scores = scored(model, groups, batches, tmp_path)
    assert set(scores["layers.1"].values()) == set(scores["layers.2"].values()) == {0.0}
    left_out = unreached_groups("stack", model, groups, scores, lambda: model(*batches[0].args))
    assert [group.name for group in left_out] == ["layers.2"]
    assert "no sample reaches 'layers.2'" in capsys.readouterr().err
    kept = groups.without(left_out)
    assert [group.name for group in kept.groups] == ["layers.0", "layers.1"]
    assert kept.fixed_bytes == groups.fixed_bytes + 64 * 64 * 4
