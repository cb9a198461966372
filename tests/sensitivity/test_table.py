"""Sensitivity tables: what is written is read, and what is damaged, or of another checkpoint, is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qexp.errors import ConfigError, DamagedFileError
from qexp.sensitivity.table import Candidate, Header, SensitivityTable, check_checkpoint, read_table, write_table

HEADER = Header(
    checkpoint={"transformer": "abc"},
    model="digits",
    score="exact",
    error="squared_error",
    unit="mean squared error of the velocity",
    samples=40,
    fixed_bytes={"transformer": 100},
    formats=("none", "gguf Q4_0"),
    versions={"torch": "2.13.0"},
)
Q4 = {"quant_method": "gguf", "quant_type": "Q4_0"}
CANDIDATES = (
    Candidate("transformer", "q", ("q", "k"), "none", {"quant_method": "none"}, 64, 0.0),
    Candidate("transformer", "q", ("q", "k"), "gguf Q4_0", Q4, 18, 0.1 + 0.2),
    Candidate("transformer", 'ü "fc",1', ('ü "fc",1',), "none", {"quant_method": "none"}, 32, 0.0),
)
TABLE = SensitivityTable(HEADER, CANDIDATES)


def test_table_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    write_table(tmp_path, TABLE)
    assert read_table(tmp_path) == TABLE
    lines = (tmp_path / "sensitivity.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "component,group,layers,format,backend,bytes,score"
    expected = 'transformer,q,q;k,gguf Q4_0,"{""quant_method"": ""gguf"", ""quant_type"": ""Q4_0""}",18,'
    assert lines[2] == expected + "0.30000000000000004"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gguf Q4_0,", "none,", "a format is in it twice"),
        (",18,0.3", ",18,-0.3", "must be 0 or more"),
        (",18,0.3", ",18,nan#0.3", "could not convert"),
        (",18,0.30000000000000004", ",18,inf", "must be 0 or more"),
        (",64,0.0", ",64,0.5", "no line 'none'"),
        (",18,", ",18.5,", "line 3: invalid literal"),
        ("q;k,gguf", "q,gguf", "other layers"),
        ('quant_method"": ""gguf', 'method"": ""gguf', "names no quant_method"),
        ("bytes,score", "score,bytes", "the columns must be"),
        ("transformer,q,q;k,none", "q;k,none", "has 5 values"),
    ],
)
def test_table_changed_by_hand_is_refused_with_the_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    write_table(tmp_path, TABLE)
    path, header = tmp_path / "sensitivity.csv", tmp_path / "sensitivity.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"is not the file that sensitivity\.json was written with"):
        read_table(tmp_path)
    content = json.loads(header.read_text(encoding="utf-8"))
    del content["digest"]  # as in a table that was made by hand
    header.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=said):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "guessed"}, "score=guessed"),
        ({"checkpoint": {}}, "no checkpoint or fixed_bytes of transformer"),
        ({"fixed_bytes": {"transformer": -1}}, "fixed_bytes"),
    ],
)
def test_table_without_meaning_is_not_written(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_table(tmp_path, replace(TABLE, header=replace(HEADER, **change)))
    assert not list(tmp_path.iterdir())


def test_table_that_is_absent_or_in_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no sensitivity\.json"):
        read_table(tmp_path)
    write_table(tmp_path, TABLE)
    (tmp_path / "sensitivity.csv").unlink()
    with pytest.raises(DamagedFileError, match="it is not there"):
        read_table(tmp_path)


def test_layer_in_two_groups_is_refused(tmp_path: Path) -> None:
    twice = Candidate("transformer", "k", ("k",), "none", {"quant_method": "none"}, 32, 0.0)
    with pytest.raises(ValueError, match="layer 'k' of 'transformer' is in two groups"):
        write_table(tmp_path, SensitivityTable(HEADER, (*CANDIDATES, twice)))


def test_scores_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    check_checkpoint(TABLE, tmp_path, {"transformer": "abc", "vae": "x"})
    for other in ({"transformer": "abd"}, {"unet": "abc"}):
        with pytest.raises(ConfigError, match="scores of another checkpoint"):
            check_checkpoint(TABLE, tmp_path, other)
