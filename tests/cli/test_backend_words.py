"""Names of formats from elsewhere lead to the option that is meant, or say that there is none."""

import pytest

from qexp.cli.backend_words import MEANT, other_word
from qexp.config.yaml_options import option_names


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("nf4", "bitsandbytes"), ("NF4", "bitsandbytes"), ("bnb", "bitsandbytes"), ("fp4", "bitsandbytes_fp4"),
        ("8bit", "bitsandbytes_int8"), ("LLM.int8", "bitsandbytes_int8"), ("int8", "torchao"),
        ("w8a8", "torchao_int8dq"),
        ("fp8", "torchao_float8wo"), ("float8_e5m2", "torchao_float8wo_e5m2"), ("int4", "quanto_int4"),
        ("int2", "packed_uint2"), ("q4_0", "gguf_q4_0"), ("Q8_0", "gguf"), ("mxfp4", "gguf backend.quant_type=MXFP4"),
        ("bf16", "none"), ("fp6", "packed_fp6_e3w2"),
    ],
)  # fmt: skip
def test_word_from_elsewhere_names_the_option(word: str, option: str) -> None:
    assert f"backend={option}" in other_word(word)


def test_every_option_that_a_word_leads_to_exists() -> None:
    meant = {option.partition(" ")[0] for options in MEANT.values() for option in options}
    assert meant <= {*option_names("backend")}


@pytest.mark.parametrize("word", ["gptq", "AWQ", "auto-gptq", "hqq", "exl2", "aqlm", "smoothquant", "nvfp4"])
def test_format_of_another_program_is_said_to_be_none_here(word: str) -> None:
    assert "made by a program of its own" in other_word(word)


@pytest.mark.parametrize("word", ["Q4_K_M", "q6_k", "IQ2_XXS", "iq4_nl"])
def test_gguf_type_that_is_only_read_says_how(word: str) -> None:
    assert "model.path=<file>.gguf" in other_word(word)


@pytest.mark.parametrize("word", ["torchoa", "gguf_q4", "banana"])
def test_other_words_say_nothing(word: str) -> None:
    assert other_word(word) == ""
