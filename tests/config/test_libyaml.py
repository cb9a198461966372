from pathlib import Path

import pytest
import yaml

from qexp.config import libyaml

CONF = Path(__file__).parents[2] / "conf"
VALUES = """
floats: [1e-3, 1.5, -.inf, .nan, 6E+4, 1_000.5, 12:30.5]
whole: [0x10, 0o7, 1_000, -3]
words: [yes, no, on, off, true, null, ~, '', 2026-11-30, 1e, 0.1.2]
nested: {a: &anchor {b: [c]}, d: *anchor}
text: |
  two
  lines
"""


@pytest.fixture(autouse=True)
def _libyaml() -> None:
    if not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML is installed without libyaml")


@pytest.mark.parametrize(
    "text",
    [
        VALUES,
        "",
        "a: 1",
        *(path.read_text() for path in sorted(CONF.rglob("*.yaml"))[::7]),
    ],
)
def test_libyaml_reads_what_omegaconf_reads(text: str) -> None:
    found, expected = (yaml.load(text, Loader=loader()) for loader in (libyaml.libyaml_loader, libyaml._PYTHON_LOADER))
    assert repr(found) == repr(expected)  # NaN is not equal to itself


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: [", "a: !!python/object:os.system x", "\ta: 1"])
def test_libyaml_refuses_what_omegaconf_refuses_in_the_same_words(text: str) -> None:
    messages = []
    for loader in (libyaml.libyaml_loader, libyaml._PYTHON_LOADER):
        with pytest.raises(yaml.YAMLError) as caught:
            yaml.load(text, Loader=loader())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
