from types import SimpleNamespace

import pytest

from qexp.errors import ConfigError
from qexp.models.base import load_source
from qexp.models.digits import Config, Source
from tests.fresh_process import imported_by


def test_source_is_found_by_its_name() -> None:
    source = load_source(Config(path="elsewhere"))
    assert isinstance(source, Source) and source.config.path == "elsewhere"


@pytest.mark.parametrize("name", ["mnist", "base", "digits_network"])
def test_unknown_source_lists_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.source='{name}' is unknown; use .*digits"):
        load_source(SimpleNamespace(source=name))


def test_declarations_and_checkpoints_need_no_torch() -> None:
    code = (
        "import qexp.models.base, qexp.tasks.generate, qexp.scoring.score, qexp.models.digits as d;"
        "qexp.models.base.load_source(d.Config()).checkpoints()"
    )
    assert "torch" not in imported_by(code)
