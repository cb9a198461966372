"""Options of conf/backend, read for Python callers without Hydra."""

import pytest

from qexp.config import backend_options
from qexp.config.backend_options import backend_of
from qexp.config.yaml_options import option_names
from qexp.errors import ConfigError
from tests.assigning import run_config


@pytest.mark.parametrize("option", [name for name in option_names("backend") if name != "mixed"])  # it needs a recipe
def test_config_is_the_one_that_the_command_line_composes(option: str) -> None:
    (composed,) = run_config(f"backend={option}", "device=cpu").components.values()
    assert vars(backend_of(option).resolved("cpu")) == vars(composed.backend)


def test_label_names_what_was_asked_for() -> None:
    assert backend_of("torchao", {"quant_type": "int4wo"}).label == "int4wo"
    assert backend_of("torchao", {"label": "mine"}).label == "mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "${oc.env:X}"}, r"backend\.label=\$\{oc\.env:X\}, of backend=torchao, is resolved"),
        ({"label": "${.quant}"}, r"backend\.label=\$\{\.quant\}"),
        ({"quant_type": "${.label}"}, r"quant_type"),
    ],
)
def test_reference_that_is_not_resolved_is_an_error(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend_of("torchao", fields)


def test_option_without_a_label_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    read = backend_options._read_option
    monkeypatch.setattr(
        backend_options,
        "_read_option",
        lambda name: {key: value for key, value in read(name).items() if key != "label"},
    )
    assert backend_of("quanto").label is None
