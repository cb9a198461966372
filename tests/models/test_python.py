"""A user's own network: how its factory is found and called, and what is said when it is not, or fails."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError, LoadError
from qexp.loading.lifecycle import load_component
from qexp.loading.saving import save_model
from qexp.models.python import PythonConfig, Source
from qexp.tasks.input_files import ForwardConfig
from qexp.tasks.roundtrip import RoundtripConfig
from tests.backends import CPU, backend_config

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
    def forward(self, x):
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x

def build(config):
    return Net(config["width"], depth=config["layers"])

def fixed():
    return Net(64)

def broken(width):
    return Net(width).blocks[0].weight.sum().item()

def nothing():
    return 7

constant = 5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with `mynets.py`, `deep/er.py` that fails to import, and weights."""
    (tmp_path / "mynets.py").write_text(CODE)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "__init__.py").write_text("")
    (tmp_path / "deep" / "er.py").write_text("def build():\n    pass\n\nimport nowhere_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    state = {f"blocks.{n}.{name}": torch.randn(shape) for n in (0, 1) for name, shape in
             (("weight", (64, 64)), ("bias", (64,)))}  # fmt: skip
    save_file(state, tmp_path / "weights.safetensors")
    yield tmp_path
    for name in ("mynets", "deep", "deep.er"):
        sys.modules.pop(name, None)


def load(factory: str, backend: str = "none", checkpoint: str = "weights.safetensors", **fields: Any) -> Any:
    source = Source(PythonConfig(factory=factory, checkpoint=checkpoint, **fields))
    settings = ComponentConfig(backend_config(backend))
    return load_component(source, "model", settings, device=CPU, loader=LoaderConfig(workers=1)).model


@pytest.mark.parametrize(
    ("factory", "arguments", "config"),
    [
        ("mynets:Net", {"width": 64}, None),
        ("mynets:Net", None, '{"width": 64, "architectures": ["Other"], "unknown": 3}'),
        ("mynets:Net", {"depth": 2}, '{"width": 64, "depth": 9}'),
        ("mynets:build", None, '{"width": 64, "layers": 2}'),
        ("mynets:fixed", None, None),
    ],
)
def test_it_is_called_with_arguments_over_the_fields_of_config_json(
    factory: str, arguments: Any, config: str | None, folder: Path
) -> None:
    if config is not None:
        (folder / "config.json").write_text(config)
    model, x = load(factory, arguments=arguments), torch.randn(3, 64)
    expected = sys.modules["mynets"].Net(64)
    expected.load_state_dict(load_file("weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_saved_quantized_it_loads_again(folder: Path) -> None:
    model = load("mynets:Net", "torchao", arguments={"width": 64})
    save_model(model, folder / "saved")
    again, x = load("mynets:Net", checkpoint="saved", arguments={"width": 64}), torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert Source(PythonConfig(factory="mynets:fixed", path=str(folder))).checkpoints() == {
        "model": folder / "weights.safetensors"  # the only file of a folder that needs no config.json
    }


@pytest.mark.parametrize(
    ("factory", "arguments", "words"),
    [
        ("mynets.py:Net", None, r"package\.module:function; write model\.factory=mynets:Net \("),
        ("./nets/my.py:build", None, r"write model\.factory=nets\.my:build \("),
        ("/srv/a b/my.py:Net", None, r"write model\.factory=my:Net, and start it with PYTHONPATH='/srv/a b' \("),
        ("../my.py:Net", None, r"write model\.factory=my:Net, and start it with PYTHONPATH=\.\. \("),
        ("mynets.Net", None, r"write model\.factory=mynets:Net \("),
        ("mynets.py", None, r"write model\.factory=mynets:<function> \("),
        ("my-nets.py:Net", None, "'my-nets.py' can be no module's name: rename it with letters, digits and _ alone"),
        ("mynets:Net", {"width": "64"}, r"model\.arguments\.width='64' must be an integer, as mynets:Net declares it"),
        ("mynets:Net", {"width": 6.4}, r"model\.arguments\.width=6\.4 must be an integer"),
        ("mynets:Net", {"width": True}, r"model\.arguments\.width=True must be an integer"),
        ("mynets:Net", {"wdh": 64}, r"model\.arguments\.wdh \(did you mean width\?\) is no argument of mynets:Net"),
        (None, None, r"factory=null must name what builds the network, as package\.module:function"),
        ("mynets", None, "factory=mynets must name what builds"),
        ("mynet:Net", None, r"no module 'mynet' \(did you mean mynets\?\) in the current directory .*installed"),
        ("deep.nets:Net", None, r"no module 'deep\.nets' in 'deep'"),
        ("mynets:Nett", None, r"'mynets' defines no 'Nett' \(did you mean Net\?\); it has Net, .*build"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_before_anything_is_imported(
    factory: Any, arguments: Any, words: str, folder: Path
) -> None:
    source = Source(PythonConfig(factory=factory, checkpoint="weights.safetensors", arguments=arguments))
    with pytest.raises(ConfigError, match=words):
        source.check_task(RoundtripConfig())
    assert "mynets" not in sys.modules


@pytest.mark.parametrize(
    ("factory", "arguments", "words"),
    [
        ("mynets:constant", None, "'mynets' has an int as 'constant'.*a function that returns the network, or its"),
        ("mynets:nothing", None, "mynets:nothing returned an int, no torch.nn.Module"),
        ("mynets:broken", {"width": 64}, r"called with \(width=64\): .*meta.*mynets\.py:\d+.*network alone"),
        ("mynets:Net", None, r"needs width, which neither config\.json .* nor model\.arguments has"),
        ("mynets:Net", {"widht": 64}, r"model\.arguments\.widht \(did you mean width\?\) is no argument of mynets:Net"),
        ("deep.er:build", None, r"importing 'deep\.er' failed: ModuleNotFoundError: .*nowhere_at_all.*er\.py:4"),
    ],
)  # fmt: skip
def test_a_factory_that_fails_says_where_and_how_it_was_called(
    factory: str, arguments: Any, words: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(factory, arguments=arguments)


def test_a_checkpoint_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"'blocks\.0\.weight' has shape \[64, 64\] .* expects \[32, 32\]"):
        load("mynets:Net", arguments={"width": 32})
    with pytest.raises(LoadError, match=r"lacks 'blocks\.2\.weight'"):
        load("mynets:Net", arguments={"width": 64, "depth": 3})


def test_settings_that_contradict_each_other_or_lack_something(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint=a and model\.path=b mean the same; set only one"):
        PythonConfig(factory="mynets:Net", checkpoint="a", path="b")
    with pytest.raises(ConfigError, match=r"model\.arguments=5 must be names and values"):
        PythonConfig(factory="mynets:Net", checkpoint="a", arguments=5)
    with pytest.raises(ConfigError, match=r"checkpoint=null names no weights"):
        Source(PythonConfig(factory="mynets:Net")).checkpoints()
    source = Source(PythonConfig(factory="mynets:Net", checkpoint="a"))
    with pytest.raises(ConfigError, match="python has no tokenizer"):
        source.check_task(ForwardConfig(inputs="lines.txt"))


def test_the_modules_file_is_part_of_what_counts(folder: Path) -> None:
    config = PythonConfig(factory="mynets:Net", checkpoint="a")
    assert config.input_files() == {"factory": folder / "mynets.py"}
