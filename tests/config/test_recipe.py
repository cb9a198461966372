"""Recipes: what is read from a file or the command line, which rule decides, and what is refused with which words."""

from pathlib import Path
from typing import Any

import pytest

from qexp.config.backend_options import backend_of
from qexp.config.dataclass_io import to_plain
from qexp.config.recipe import Rule, read_recipe, rule_for, undecided_patterns
from qexp.errors import ConfigError

LAYERS = ["embed", "blocks.0.attn.q", "blocks.0.mlp", "blocks.1.attn.q", "blocks.1.mlp", "head"]
TEXT = """
name: edges
rules:
  - {modules: [embed, head], backend: gguf}   # Q8_0
  - modules: "**.mlp"
    backend: gguf
    quant_type: Q5_1
  - {modules: blocks.0, backend: none}
  - {backend: bitsandbytes, bnb_4bit_blocksize: 32}
"""


def rules_of(*rules: Any) -> tuple[Rule, ...]:
    return read_recipe(list(rules), "backend.recipe")[1]


def test_a_file_is_read_with_options_and_their_fields(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT)
    name, rules = read_recipe(f"@{tmp_path / 'r.yaml'}", "backend.recipe")
    assert name == "edges"
    assert [rule.modules for rule in rules] == [("embed", "head"), ("**.mlp",), ("blocks.0",), ()]
    assert [rule.format for rule in rules] == ["gguf Q8_0", "gguf Q5_1", "none", "bitsandbytes nf4"]
    nf4 = rules[3].backend
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_blocksize) == (True, "nf4", 32)
    decided = {layer: rule_for(rules, layer) for layer in LAYERS}
    assert decided == {
        "embed": 0, "blocks.0.attn.q": 2, "blocks.0.mlp": 1, "blocks.1.attn.q": 3, "blocks.1.mlp": 1, "head": 0,
    }  # fmt: skip


def test_a_recipe_without_a_name_is_called_by_its_file_or_its_formats(tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text("[{modules: a, backend: gguf}, {backend: none}]")
    assert backend_of("mixed", {"recipe": f"@{tmp_path / 'half.yaml'}"}).label == "half"
    assert backend_of(f"@{tmp_path / 'half.yaml'}").label == "half"
    inline = backend_of("mixed", {"recipe": [{"modules": "a", "backend": "gguf"}, {"backend": "none"}]})
    assert inline.label == "gguf Q8_0+none"


def test_a_resolved_recipe_is_read_again_as_it_was() -> None:
    config = backend_of("mixed", {"recipe": [{"modules": "a", "backend": "torchao_int8dq"}, {"backend": "gguf"}]})
    for again in (to_plain(config)["recipe"], list(config.recipe)):
        assert read_recipe(again, "backend.recipe")[1] == config.recipe


def test_types_that_another_backend_runs_are_resolved_by_rule() -> None:
    """torchao's int4wo has no kernel on a CPU: qexp_packed runs it, in a rule as anywhere."""
    config = backend_of("mixed", {"recipe": [{"backend": "torchao", "quant_type": "int4wo"}]})
    assert config.resolved("cpu").recipe[0].backend == backend_of("torchao", {"quant_type": "int4wo"}).resolved("cpu")
    assert config.resolved("cpu").methods() == ("qexp_packed",)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"backend": "gguf"}, {"backend": "none"}], r"rule 1 \(default -> gguf Q8_0\) covers every layer"),
        ([{"modules": "**", "backend": "gguf"}, {"backend": "none"}], "rule 1 .* covers every layer"),
        ([{"modules": "a", "backend": "gguf"}], r"the last rule \(a -> gguf Q8_0\) is not a default"),
        ([{"modules": [], "backend": "gguf"}, {"backend": "none"}], r"rule 1: modules=\[\] is empty"),
        ([{"modules": "a|b", "backend": "gguf"}, {"backend": "none"}], r"rule 1: modules: 'a\|b' can match no module"),
        ([{"modules": 3, "backend": "gguf"}, {"backend": "none"}], "rule 1: modules=3 must be a list"),
        ([{"modules": "a"}, {"backend": "none"}], "rule 1 has no backend"),
        ([{"modules": "a", "backend": None}, {"backend": "none"}], "rule 1 has backend=None"),
        ([{"backend": "ggu"}], r"rule 1: backend='ggu' is unknown \(did you mean gguf"),
        ([{"backend": "gguf", "quant_typ": "Q4_0"}], r"rule 1: .*quant_typ is not a known .*quant_type"),
        ([{"backend": "gguf", "quant_type": "Q3_9"}], "rule 1: backend.quant_type='Q3_9' is unknown"),
        ([{"backend": "quanto", "calibration_samples": "x"}], "rule 1: .*calibration_samples='x' must be an integer"),
        ([{"backend": "mixed", "recipe": [{"backend": "gguf"}]}], "rule 1: backend=mixed is a recipe itself"),
        ([{"backend": "gguf", "modules_to_not_convert": ["a"]}], "modules_to_not_convert=.'a'. is for a whole model"),
        ([{"backend": "bitsandbytes_int8", "llm_int8_skip_modules": ["a"]}], "skip_modules=.'a'. is for"),
        ([{"backend": "bitsandbytes_int8", "llm_int8_enable_fp32_cpu_offload": True}], "is for a whole model"),
        ([{"backend": "quanto", "activations_dtype": "int8"}], "activations_dtype=int8 is calibrated"),
        ([{"backend": {"quant_method": "gguf"}, "modules": None}], "rule 1: modules=None must be a list"),
        ([{"backend": {"quant_method": "gguf"}, "quant_type": "Q4_0"}], "quant_type beside a backend in full"),
        (["gguf"], "rule 1 is 'gguf', not a group of fields"),
        ({"rules": [], "rule": 1}, "has 'rule'; a recipe has only 'rules' and"),
        ({"rules": [{"backend": "gguf"}], "name": 3}, "name=3 must be a string"),
        (3, "must be a list of rules"),
        ("recipe.yaml", "recipe.yaml must be @file"),
        ("@/no/such/recipe.yaml", "cannot be read: No such file"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_clear_error(rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend_of("mixed", {"recipe": rules})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {modules: *.mlp, backend: gguf}", "is not valid yaml: .*a pattern with \\* needs quotes"),
        ("rules: [{backend: gguf, backend: none}]", "is not valid yaml: .*duplicate key"),
        ("", "is not a recipe: it is empty; give "),
        ("some notes", "is not a recipe: it has 'some notes' and no 'rules'; give "),
        ("rules: [{backend: ${nowhere}}]", "is not valid yaml: .*nowhere"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(f"@{tmp_path / 'r.yaml'}", "backend.recipe")


def test_no_recipe_is_said_when_it_is_used() -> None:
    config = backend_of("mixed")
    with pytest.raises(ConfigError, match=r"backend=mixed needs a recipe; give backend.recipe=@recipe.yaml, or "):
        config.resolved("cpu")


def test_patterns_that_decide_nothing_are_found_with_near_misses() -> None:
    rules = rules_of(
        {"modules": ["blocks.1", "blocks.0.att"], "backend": "gguf"},
        {"modules": "blocks.1.mlp", "backend": "gguf_q4_0"},
        {"modules": "head", "backend": "gguf"},
        {"modules": "embed", "backend": "none"},
        {"backend": "none"},
    )
    found = undecided_patterns(rules, LAYERS, ["head", "embed"], "here")
    assert list(found) == ["blocks.0.att", "blocks.1.mlp", "head"]
    assert "matches no linear layer; did you mean blocks.0.attn.q" in found["blocks.0.att"]
    assert "rule 2 (blocks.1.mlp -> gguf Q4_0) is never reached" in found["blocks.1.mlp"]
    assert "('blocks.1.mlp' by 'blocks.0.att, blocks.1 -> gguf Q8_0'); move it up" in found["blocks.1.mlp"]
    assert "quantizes nothing: skip_modules or keep_in_fp32_modules has 'head'" in found["head"]


def test_a_pattern_that_decides_one_layer_of_many_is_no_error() -> None:
    rules = rules_of(
        {"modules": "**.mlp", "backend": "gguf"}, {"modules": "blocks", "backend": "none"}, {"backend": "gguf"}
    )
    assert undecided_patterns(rules, LAYERS, ["blocks.0.mlp"], "here") == {}
