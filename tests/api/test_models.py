"""The Python API: what it takes, what it refuses, that its page is right, and that importing it costs nothing."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qexp
from qexp.config.backend_options import backend_of
from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError, LoadError, UnsupportedError
from qexp.offloading.payload import true_nbytes
from qexp.quantizers.bitsandbytes_support.config import BitsAndBytesConfig
from tests.assigning import run_config
from tests.backends import EVERY_WAY, Stack, StackSource, backend_config, save_stack
from tests.fresh_process import run_python

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHAPES = [(128, 64), (64, 128), (32, 64)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_stack(tmp_path / "stack", SHAPES, dtype=torch.float32)
    return tmp_path / "stack"


def stack(config: dict[str, Any]) -> nn.Module:
    return Stack([tuple(shape) for shape in config["shapes"]], config["bias"])


def load(folder: Path, backend: Any = None, **settings: Any) -> Any:
    return qexp.load(folder, backend, skeleton=stack, device="cpu", **settings)


def test_importing_it_is_light() -> None:
    run_python("""
import sys
import qexp
assert {"load", "offload", "save", "memory_footprint", "remove_offload", "backends"} <= set(dir(qexp))
names = qexp.backends()
assert "bitsandbytes" in names and "mixed" not in names
import qexp.config.offload
assert callable(qexp.offload) and qexp.config.offload.STRATEGIES
heavy = {"torch", "bitsandbytes", "torchao", "optimum", "diffusers", "transformers", "accelerate", "hydra"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
""")
    with pytest.raises(AttributeError, match="no attribute 'laod'; it has backends, load"):
        _ = qexp.laod  # type: ignore[attr-defined]


def test_the_page_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 7
    names: dict[str, Any] = {"__name__": "page"}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    for line in re.findall(r"^# (\d.*)$", "\n".join(blocks), re.MULTILINE):  # what is said to be printed
        assert line in capsys.readouterr().out


def test_the_readme_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = BLOCK.findall(README.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    assert type(names["model"].get_submodule("blocks.0.attn.to_q")) is nn.Linear
    assert qexp.load("saved", device="cpu").quantization_method == "bitsandbytes"


@pytest.mark.parametrize("name", EVERY_WAY)
def test_a_name_is_what_the_command_line_makes_of_it(name: str) -> None:
    composed = run_config("device=cpu", f"backend={name}").components["transformer"].backend
    assert backend_of(name) == backend_config(name) == composed


def test_every_way_to_name_a_backend(folder: Path) -> None:
    import diffusers

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=("layers.1",))
    mapping = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    upstream = diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["layers.1"]
    )
    for backend, skip in [("bitsandbytes", ["layers.1"]), (config, []), (mapping, ["layers.1"]), (upstream, [])]:
        model = load(folder, backend, skip_modules=skip)
        assert [type(layer).__name__ for layer in model.layers] == ["Linear4bit", "Linear", "Linear4bit"]
    assert type(load(folder)) is Stack


def test_what_is_no_backend() -> None:
    for backend, message in [
        ("nf4", r"backend='nf4' is unknown.*use bitsandbytes, "),
        ("quantoo", r"did you mean quanto"),
        ({"quant_method": "nf4"}, r"is no backend; use a name"),
        (3, r"is no backend; use a name"),
        ({"quant_method": "quanto", "weights_dtype": "int3"}, r"weights_dtype='int3' is unknown"),
    ]:
        with pytest.raises(ConfigError, match=message):
            qexp.load("digits", backend, device="cpu")


def test_every_way_to_name_a_source(folder: Path, tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self, shapes: list[list[int]], bias: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=bias) for rows, columns in shapes)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = load(folder)(x)
    assert torch.equal(load(str(folder))(x), expected)  # type: ignore[arg-type]
    by_class: Any = qexp.load(folder, skeleton=Fixed, device="cpu")
    assert torch.equal(by_class.layers[2].weight, load(folder).layers[2].weight)
    source: Any = StackSource(folder)
    assert torch.equal(qexp.load(source, device="cpu")(x), expected)
    file: Any = qexp.load(folder / "model.safetensors", skeleton=lambda _: Stack(SHAPES), device="cpu")
    assert torch.equal(file(x), expected)
    with pytest.raises(ConfigError, match=r"component='vae' is none of this source's: use stack"):
        qexp.load(source, component="vae", device="cpu")


def test_a_file_is_described_by_the_config_beside_it(folder: Path) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    model: Any = qexp.load(folder / "model.safetensors", skeleton=stack, device="cpu")
    assert torch.equal(model(x), load(folder)(x))
    qexp.save(load(folder, "quanto"), folder.parent / "saved")
    (file,) = (folder.parent / "saved").glob("*.safetensors")
    assert load(file).quantization_method == "quanto"


def test_what_the_command_line_leaves_unquantized() -> None:
    def unquantized(source: Any, **settings: Any) -> set[str]:
        model = qexp.load(source, "torchao", device="cpu", **settings)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        return {name for name, layer in layers.items() if type(layer.weight) is nn.Parameter}

    assets = Path(qexp.__file__).parent / "assets"
    assert unquantized("digits") == {"x_embed", "proj_out"}
    assert unquantized("digits", skip_modules=["blocks.0.attn.to_q"]) == {"x_embed", "proj_out", "blocks.0.attn.to_q"}
    assert unquantized(assets / "digits") == {"x_embed", "proj_out"}
    assert unquantized("arithmetic") == unquantized(assets / "arithmetic") == {"lm_head"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: load(folder, skip_modules=3), "skip_modules=3 must be a list"),
        (lambda folder: load(folder, keep_in_fp32_modules=None), "keep_in_fp32_modules=None must be a list"),
        (lambda folder: load(folder, workers="two"), "loader.workers='two' must be an integer, or null"),
        (lambda folder: load(folder, in_flight_mib=0.5), "loader.in_flight_mib=0.5 must be an integer"),
        (lambda folder: qexp.load(folder, skeleton=stack, device=0), r"device=0 is unknown \(did you mean cuda:0\?\)"),
        (lambda folder: qexp.load(folder, skeleton="Net"), "skeleton='Net' must be a class or a function"),
        (lambda folder: qexp.offload("digits"), "offload: model='digits' must be a torch.nn.Module"),
        (lambda folder: qexp.remove_offload(None), "remove_offload: model=None must be a torch.nn.Module"),
        (lambda folder: qexp.memory_footprint({}), "memory_footprint: model={} must be a torch.nn.Module"),
        (lambda folder: qexp.save("digits", folder), "save: model='digits' must be a torch.nn.Module"),
        (lambda folder: qexp.save(nn.ReLU(), None), "folder=None must be a path"),
        (lambda folder: qexp.save(nn.ReLU(), folder, max_shard_gib="5GB"), "max_shard_gib='5GB' must be a number"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call: Any, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        call(folder)


def test_a_device_is_checked_however_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexp.system.devices.cuda_device_count", lambda: 0)
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"max_memory=.* limits a device_map, and none is set"):
        qexp.load(folder, skeleton=stack, device=cpu, max_memory={"cpu": "1KiB"})
    with pytest.raises((ConfigError, LoadError), match="max_memory"):
        qexp.load(folder, skeleton=stack, device=cpu, device_map={"": "cpu"}, max_memory={"cpu": "1KiB"})
    with pytest.raises(UnsupportedError, match="device=cuda:3 needs CUDA device 3"):
        qexp.load(folder, skeleton=stack, device=torch.device("cuda:3"))
    model = qexp.load(folder, skeleton=stack, device=cpu)
    with pytest.raises(UnsupportedError, match="device=cuda:3 needs CUDA device 3"):
        qexp.offload(model, "leaf", torch.device("cuda:3"))  # type: ignore[operator]


def test_arguments_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    for settings, message in [
        ({"numblocks": 1}, r"numblocks is no setting \(did you mean num_blocks_per_group"),
        ({"num_blocks_per_group": 2.5}, r"num_blocks_per_group=2\.5 must be a whole number"),
        ({"prefetch_depth": "2"}, r"prefetch_depth='2' must be a whole number"),
        ({"resident_gib": "1"}, r"resident_gib='1' must be a number"),
        ({"block_lists": "layers"}, r"block_lists='layers' must be a list"),
    ]:
        with pytest.raises(ConfigError, match=message):
            qexp.offload(model, "block", "cpu", **settings)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"source=5 is no source; give a path"):
        qexp.load(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"source='~nouser/x' names no folder.*in full"):
        qexp.load("~nouser/x")
    with pytest.raises(LoadError, match=r"source='digit' \(did you mean digits\?\)"):
        qexp.load("digit")
    with pytest.raises(ConfigError, match=r"max_shard_gib=0.0 must be a number above 0"):
        qexp.save(model, tmp_path / "saved", max_shard_gib=0)


def test_a_network_that_nothing_describes(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no class of diffusers.*pass skeleton="):
        qexp.load(folder, device="cpu")
    with pytest.raises(ConfigError, match=r"skeleton=Linear cannot be built from the fields"):
        qexp.load(folder, skeleton=nn.Linear, device="cpu")
    for entry, message in [
        ({"_class_name": "FluxPipeline"}, r"_class_name='FluxPipeline', which diffusers .* has not"),
        ({"architectures": ["NoSuchModel"]}, r"architectures='NoSuchModel', which transformers .* has not"),
    ]:
        (folder / "config.json").write_text(json.dumps(entry))
        with pytest.raises(LoadError, match=message):
            qexp.load(folder, device="cpu")
    with pytest.raises(LoadError, match="does not exist"):
        qexp.load(folder / "nowhere", skeleton=stack, device="cpu")


def test_settings_reach_the_load(folder: Path) -> None:
    model = load(folder, "torchao", compute_dtype=torch.bfloat16, keep_in_fp32_modules=["layers.2"], workers=1)
    assert model.layers[0].bias.dtype == torch.bfloat16 == model._pre_quantization_dtype
    assert model.layers[2].weight.dtype == torch.float32
    with pytest.raises(ConfigError, match=r"skip_modules of .*'nowhere' matches no module"):
        load(folder, "torchao", skip_modules=["nowhere"])
    with pytest.raises(ConfigError, match=r"compute_dtype=int8 is not a compute dtype"):
        load(folder, compute_dtype="int8")
    with pytest.raises(ConfigError, match=r"device=tpu is unknown"):
        qexp.load(folder, skeleton=stack, device="tpu")


def test_device_maps_reach_the_load(folder: Path, tmp_path: Path) -> None:
    assert load(folder, device_map={"": "cpu"}).layers[0].weight.device.type == "cpu"
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = load(folder, "torchao")(x)
    places = {"layers.0": "disk", "": "cpu"}
    model = load(folder, "torchao", device_map=places, offload_folder=tmp_path / "weights")
    assert torch.equal(model(x), expected)
    assert any((tmp_path / "weights").rglob("*.bin"))
    qexp.remove_offload(model)
    assert torch.equal(model(x), expected) and not (tmp_path / "weights").exists()
    small = load(folder, "torchao", device_map="auto", max_memory={"cpu": "26KB", "disk": "1GiB"})
    assert torch.equal(small(x), expected)
    with pytest.raises(ConfigError, match=r"max_memory=.* limits a device_map, and none is set"):
        load(folder, max_memory={"cpu": "1GiB"})
    with pytest.raises(ConfigError, match=r"device_map=everywhere is unknown"):
        load(folder, device_map="everywhere")


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_memory_footprint(backend: str, folder: Path) -> None:
    """By hand for three layers: what the format says of each weight, and fp32 biases."""
    group = {"group_size": 32} if "packed" in backend else {}
    model = load(folder, {**vars(backend_config(backend)), **group}, skip_modules=[])
    weights = sum(true_nbytes(layer.weight) for layer in model.layers)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert qexp.memory_footprint(model) == weights + 4 * (128 + 64 + 32) + buffers
    dense = 4 * sum(rows * columns for rows, columns in SHAPES)
    assert weights == dense if backend == "none" else weights < 0.45 * dense
    qexp.offload(model, "leaf", "cpu", to="cpu")
    assert qexp.memory_footprint(model) == pytest.approx(weights + 4 * 224 + buffers, rel=0.01)


def test_offload_and_back(folder: Path, tmp_path: Path) -> None:
    model = load(folder, "bitsandbytes_nf4_dq")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    for strategy, settings in [
        ("leaf", {}),
        ("block", {"to": "cpu", "num_blocks_per_group": 2}),
        ("model", {"folder": tmp_path / "weights"}),
        (OffloadConfig("sequential", "cpu"), {}),
    ]:
        offload = qexp.offload(model, strategy, "cpu", **settings)  # type: ignore[operator]
        assert torch.equal(model(x), expected)
        assert offload.statistics()["offload/copies"] > 0
        with pytest.raises(ConfigError, match="offloaded already"):
            qexp.offload(model, "leaf", "cpu")  # type: ignore[operator]
        assert qexp.remove_offload(model) is model
        assert torch.equal(model(x), expected)
    assert not (tmp_path / "weights").exists()
    with pytest.raises(ConfigError, match=r"this Stack is not offloaded; qexp\.offload"):
        qexp.remove_offload(model)
    with pytest.raises(ConfigError, match=r"offload\.strategy='leafs' is unknown"):
        qexp.offload(model, "leafs", "cpu")  # type: ignore[operator]


def test_save_and_load_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder, "quanto")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    files = qexp.save(model, tmp_path / "saved", max_shard_gib=1e-5)
    assert len(files) > 3 and all(file.is_file() for file in files)
    assert torch.equal(load(tmp_path / "saved")(x), expected)
    with pytest.raises(ConfigError, match="was not loaded by qexp"):
        qexp.save(Stack(SHAPES), tmp_path / "other")


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "5"])
def test_a_size_of_shards_that_is_none(limit: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"save\.max_shard_gib='?{limit}(\.0)?'? must be a (finite )?number"):
        qexp.save(load(folder), tmp_path / "saved", max_shard_gib=limit)
    assert not (tmp_path / "saved").exists()
