"""What the proof compares: a rule by hand, uniform formats that fit, and recipes that load each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qexp.config.recipe import read_recipe
from qexp.fit.mix import Mix, rules_of, uniform_mix
from qexp.fit.program import Limits
from qexp.sensitivity.table import Candidate

if TYPE_CHECKING:
    from qexp.fit.plan import FitPlan

NAMES = ("x_embed", "blocks.0.fc", "blocks.0.modulation.1", "blocks.0.renorm.fc", "out")
BACKENDS = {"none": {"quant_method": "none"}, "gguf Q4_0": {"quant_method": "gguf", "quant_type": "Q4_0"},
            "gguf Q8_0": {"quant_method": "gguf", "quant_type": "Q8_0"}}  # fmt: skip
BYTES = {"none": 1600, "gguf Q4_0": 450, "gguf Q8_0": 850}


def groups() -> list[list[Candidate]]:
    return [
        [Candidate("m", name, (name,), key, BACKENDS[key], BYTES[key], float(1600 - BYTES[key])) for key in BYTES]
        for name in NAMES
    ]


def planned(budget: int) -> FitPlan:
    from qexp.fit.budget import Size
    from qexp.fit.layers import ComponentLayers, ModelLayers
    from qexp.fit.plan import FitPlan
    from qexp.sensitivity.table import Header, SensitivityTable

    header = Header({"m": ""}, "m", "exact", "kl", "", 1, {"m": 0}, (), {})
    model = ModelLayers({"m": ComponentLayers(0, {}, {}, {}, {}, {}, NAMES)}, 0, 0, {}, {})
    return FitPlan(model, groups(), Size(0, 1, 0), Limits(budget), SensitivityTable(header, ()), Path("."))


@pytest.mark.parametrize(
    ("budget", "others"),
    [(3 * 1600 + 2 * 850, "gguf Q8_0"), (3 * 1600 + 2 * 850 - 1, "gguf Q4_0"), (3 * 1600 + 2 * 450 - 1, None)],
)
def test_rule_by_hand_keeps_what_people_keep_and_fits(budget: int, others: str | None) -> None:
    from qexp.fit.contestants import rule_by_hand

    plan = planned(budget)
    rule = rule_by_hand(plan, plan.model)
    found = None if rule is None else {choice.group: choice.format for choice in rule.choices}
    kept = dict.fromkeys(("x_embed", "blocks.0.modulation.1", "out"), "none")
    # "renorm" is no norm: names are compared by whole words
    expected = {**kept, "blocks.0.fc": others, "blocks.0.renorm.fc": others} if others is not None else None
    assert found == expected


def test_mixes_without_the_fewest_bits_are_tried_too() -> None:
    from qexp.fit.contestants import careful_mixes
    from qexp.fit.program import best_mix

    plan = planned(3 * 450 + 850 + 1600)
    mix = best_mix(plan.groups, plan.limits)
    assert mix is not None and mix.formats == {"gguf Q4_0": 3, "gguf Q8_0": 1, "none": 1}
    assert list(careful_mixes(plan, mix)) == []  # five layers in Q8_0 do not fit
    plan = planned(5 * 850)
    mix = Mix((*(group[2] for group in plan.groups[:4]), plan.groups[4][1]))
    ((name, found),) = careful_mixes(plan, mix)
    assert (name, found.formats) == ("mix above gguf Q4_0", {"gguf Q8_0": 5})


def test_rules_of_a_mix_are_a_recipe_that_gives_each_layer_its_format() -> None:
    mixed = Mix(tuple(group[number % 3] for number, group in enumerate(groups())))
    _, rules = read_recipe(rules_of(mixed, "m"), "recipe")
    assert {layer: rule.format for rule in rules for layer in rule.modules} == {
        "blocks.0.fc": "gguf Q4_0", "blocks.0.modulation.1": "gguf Q8_0", "out": "gguf Q4_0",
    }  # fmt: skip
    assert rules[-1].modules == () and rules[-1].format == "none"
    assert rules_of(uniform_mix(groups(), "none"), "m") == [{"backend": "none"}]


@pytest.mark.parametrize(("skipped", "expected"), [("[x_embed]", "backend=packed_uint4"), ("[]", "backend=mixed")])
def test_uniform_format_that_no_whole_model_can_have_is_a_recipe(skipped: str, expected: str, tmp_path: Path) -> None:
    from qexp.config.backend_options import backend_of
    from qexp.fit.layers import fields_of, plan_layers
    from qexp.fit.recipes import backend_overrides
    from qexp.models.base import load_source
    from tests.assigning import run_config

    config = run_config("model=digits", f"model.skip_modules={skipped}", "device=cpu", "backend=none")
    backend = backend_of("packed_uint4")
    model = plan_layers(load_source(config.model), config, ["transformer"], {"uint4wo": backend}, hashed=False)
    layers = model.components["transformer"].formats["uint4wo"].nbytes  # x_embed has rows of 4, groups have 64
    choices = [Candidate("transformer", name, (name,), "uint4wo", fields_of(backend), 1, 0.0) for name in layers]
    words = backend_overrides(Mix(tuple(choices)), model, tmp_path, "uniform")
    assert words[0] == expected
    assert "x_embed" not in layers
    run_config("model=digits", f"model.skip_modules={skipped}", "device=cpu", *words)
