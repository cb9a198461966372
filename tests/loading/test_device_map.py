"""Device maps: where each part of a model goes, what is refused before a weight is read, and how it runs on a CPU."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError
from qexp.loading.component import LoadedComponent
from qexp.loading.components import entries_of
from qexp.loading.device_map import main_device, no_split_classes, place
from qexp.loading.plan import LoadPlan
from qexp.loading.saving import save_model
from qexp.offloading.payload import as_bytes
from qexp.offloading.placement import Placement
from qexp.offloading.strategies import apply_offload
from tests.backends import BACKENDS, CPU
from tests.loading.toys import WIDTH, Block, Toy, load_toy, random_state, save_state, settings
from tests.products import representatives

EMPTY = LoadPlan((), {}, ())
FAKE_CUDA = torch.device("cuda", 0)


def placed(device_map: Any, max_memory: Any = None, device: torch.device = CPU, no_split: Any = ()) -> Placement:
    """The toy, dense."""
    return place(Toy(), EMPTY, device_map, main_device(device_map, device), max_memory, no_split)


def load(
    folder: Path, backend: str, device_map: Any, max_memory: Any = None, store: Path | None = None
) -> LoadedComponent:
    options = {"device_map": device_map, "max_memory": max_memory, "store": store}
    return load_toy(folder, settings(backend), **options)


def content(file: Path) -> Any:
    """What a saved file holds, as something short to compare; metadata of torchao come in any order."""
    if file.suffix != ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        digests = {name: hashlib.sha256(as_bytes(tensor).numpy()).hexdigest() for name, tensor in tensors.items()}
        return digests, {name: sorted(text) for name, text in opened.metadata().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("toy"), random_state(Toy))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two accelerators with free memory, as far as planning goes."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: 2**20, 1: 2**20, "cpu": 2**30})


@pytest.mark.parametrize("device_map", [None, "cpu", CPU, {"": "cpu"}, {"": CPU}])
def test_one_device(device_map: Any) -> None:
    assert placed(device_map).is_default
    assert placed(device_map).places == {"": CPU}


def test_an_index_is_of_the_kind_of_the_device(gpus: None) -> None:
    assert main_device({"": 1}, CPU) == torch.device("cuda", 1)
    assert main_device({"a": "cpu", "b": 1, "c": 0}, FAKE_CUDA) == torch.device("cuda", 1)
    assert main_device({"a": "cpu", "b": "disk"}, FAKE_CUDA) == CPU
    assert main_device("auto", FAKE_CUDA) == FAKE_CUDA


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            {"blocks": "cpu"},
            r"gives no device for 8 tensors: 'scale', 'embed.weight', 'embed.bias'.*use '\*' \(in Python also ''\)",
        ),
        (
            {"": "cpu", "blocs.0": "disk"},
            r"names 'blocs.0', which is no module or tensor of Toy \(did you mean blocks.0",
        ),
        ({"": "dsk"}, r"device_map has 'dsk' \(did you mean disk\?\); this machine has auto, balanced"),
        ({"": "cuda:7"}, "device_map has 'cuda:7'"),
        ({"": 0}, "device_map has 'cuda:0'"),
        ("balanced_low", r"'balanced_low' \(did you mean balanced"),
    ],
)
def test_maps_that_cannot_be_followed(device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placed(device_map)


def test_a_map_that_exceeds_the_memory_is_refused_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "headers_only"
    source.mkdir()
    content = (folder / "model.safetensors").read_bytes()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"puts 0\.00\d+ GiB on cpu, which has 0\.000977 GiB by max_memory"):
        load(source, "none", "cpu", {"cpu": "1MiB"})
    with pytest.raises(ConfigError, match=r"max_memory.cpu.=much is not a size"):
        load(source, "none", "auto", {"cpu": "much"})
    with pytest.raises(ConfigError, match=r"puts .* GiB on disk, but no folder is given; pass offload_folder"):
        load(source, "none", {"": "cpu", "blocks": "disk"})
    with pytest.raises(ConfigError, match=r"on disk, which has 0\.000001 GiB by max_memory"):
        load(source, "none", "auto", {"cpu": "2MiB", "disk": 1000})
    with pytest.raises(ConfigError, match=r"leaves .* of cpu for offloaded layers, but the largest needs"):
        load(source, "none", {"": "cpu", "blocks": "disk"}, {"cpu": 300_000}, tmp_path)
    assert not list(tmp_path.glob("offload-*"))


def test_a_module_that_is_in_two_places_and_one_that_reads_its_parts() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared.append(shared[0])
    with pytest.raises(ConfigError, match="one and the same module, 0 or 2, on cpu or disk"):
        place(shared, EMPTY, {"": "cpu", "2": "disk"}, CPU, None, ())
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ConfigError, match="splits '0', but MultiheadAttention reads the weights of its parts itself"):
        place(attention, EMPTY, {"": "cpu", "0.out_proj": "disk"}, CPU, None, ())


def test_sizes_are_those_of_the_quantized_weights(folder: Path, tmp_path: Path) -> None:
    """2.7 MB dense, 0.7 MB in 8 bits: with 1 MB for the CPU, only the quantized model needs no disk."""
    limit = {"cpu": 1_000_000}
    assert load(folder, "torchao", "auto", limit).dispatch is None
    dense = load(folder, "none", "auto", limit, tmp_path).placement
    assert dense.bytes_by_place()["disk"] > 1_500_000
    for backend in ("torchao", "bitsandbytes", "quanto_int4", "gguf"):
        loaded = load(folder, backend, "auto", limit)
        sizes = loaded.placement.nbytes
        assert all(sizes[item.target] == item.result_nbytes for item in loaded.plan.items)


def test_a_map_that_names_only_modules_with_tensors(folder: Path, tmp_path: Path) -> None:
    device_map = {name: "cpu" for name in ("scale", "shift", "steps", "position", "embed", "blocks.0", "head")}
    loaded = load(folder, "torchao", {**device_map, "blocks.1": "disk"}, store=tmp_path)
    x = torch.randn(3, WIDTH, dtype=loaded.model.scale.dtype)
    assert torch.equal(loaded.model(x), load_toy(folder, settings("torchao")).model(x))


def test_where_things_compute(gpus: None) -> None:
    cuda = [torch.device("cuda", index) for index in range(2)]
    explicit = placed({"blocks.0": "cpu", "embed": 1, "blocks.1.fc1": 0, "": "disk", "blocks.1": "cpu", "head": "cpu"})
    assert explicit.main == cuda[1] == explicit.device_of("scale")
    assert explicit.place_of("scale") == "disk"
    computes = {name: explicit.device_of(name) for name in ("embed", "blocks.0.fc1", "blocks.1.fc1", "blocks.1.fc2")}
    assert list(computes.values()) == [cuda[1], cuda[1], cuda[0], cuda[1]]
    assert explicit.device_of("head.weight") == cuda[0]  # the one that the map names last before it
    planned = placed("sequential", {0: 1_000_000, 1: 700_000, "cpu": 1_300_000}, FAKE_CUDA)
    assert {str(place) for place in planned.places.values()} == {"cuda:0", "cuda:1", "cpu", "disk"}
    assert planned.main == cuda[0]
    travelling = [name for name, rest in planned.places.items() if rest in ("disk", CPU)]
    assert {planned.computes[name] for name in travelling} == {cuda[0]}  # where room was kept
    assert planned.hf_device_map()["embed"] == 0
    assert json.loads(json.dumps(planned.to_container()))["device_map"]["embed"] == "cuda:0"


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_planned_maps_and_blocks_that_stay_whole(device_map: str, gpus: None) -> None:
    no_split = no_split_classes(Toy(), ["blocks"])
    assert no_split == {"Block"}
    found = placed(device_map, {0: 1_200_000, 1: 1_300_000, "cpu": 5_000_000}, FAKE_CUDA, no_split)
    for block in ("blocks.0", "blocks.1"):
        assert len({found.place_of(f"{block}.{part}") for part in ("norm", "fc1", "fc2")}) == 1
    used = found.bytes_by_place()
    assert used.get("cuda:0", 0) <= 1_200_000 and used.get("cuda:1", 0) <= 1_300_000
    assert sum(used.values()) == sum(t.nbytes for t in [*Toy().parameters(), *Toy().buffers()])
    assert placed("balanced_low_0", {0: 3_000_000, 1: 3_000_000}, FAKE_CUDA).bytes_by_place().keys() == {"cuda:1"}


def test_classes_that_must_not_be_split() -> None:
    class Told(nn.Module):
        _no_split_modules = ("Inner",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])
            self.attention = nn.MultiheadAttention(4, 1)

    assert no_split_classes(Told(), ["blocks"]) == {"Inner", "MultiheadAttention"}
    assert no_split_classes(nn.Sequential(Told()), []) == {"Inner", "MultiheadAttention"}


@pytest.mark.parametrize("backend", representatives(BACKENDS, ["bitsandbytes_int8", "torchao", "quanto_int4", "gguf"]))
def test_what_rests_on_disk_answers_as_if_it_were_in_memory(backend: str, folder: Path, tmp_path: Path) -> None:
    resident = load_toy(folder, settings(backend)).model
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=resident.scale.dtype)
    loaded = load(folder, backend, {"": "cpu", "blocks.1": "disk", "embed": "disk"}, store=tmp_path / "store")
    assert loaded.dispatch is not None and loaded.plan.to_container().keys()
    expected = sum(bytes_ for name, bytes_ in loaded.placement.nbytes.items() if name.startswith(("blocks.1", "embed")))
    at_rest = loaded.dispatch.bytes_at_rest()
    assert expected - 100 <= at_rest["disk"] <= expected + 30 * 256  # quanto's scales of activations stay
    files = list((tmp_path / "store").glob("offload-*/*.bin"))
    assert len(files) == 2 and sum(file.stat().st_size for file in files) == at_rest["disk"]  # a block, a leaf module
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(loaded.model(x), resident(x))
    assert loaded.model.hf_device_map == {"": "cpu", "embed": "disk", "blocks.1": "disk"}
    statistics = loaded.dispatch.statistics()
    assert statistics["memory/weights_disk_gib"] * 2**30 == at_rest["disk"]
    assert statistics["offload/at_rest_device_gib"] == 0
    with pytest.raises(ConfigError, match="is offloaded already"):
        apply_offload(loaded.model, OffloadConfig("leaf", "cpu"), device=CPU, block_lists=[], store=None)
    if backend != "none" and not loaded.model.hf_quantizer.is_serializable:
        loaded.dispatch.remove()
        return
    save_model(loaded.model, tmp_path / "saved")
    save_model(resident, tmp_path / "resident")
    for file in (tmp_path / "resident").iterdir():
        assert content(tmp_path / "saved" / file.name) == content(file)
    loaded.dispatch.remove()
    assert not (tmp_path / "store").exists()
    with torch.no_grad():
        assert torch.equal(loaded.model(x), resident(x))


def test_everything_on_disk_computes_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    resident = load_toy(folder, settings("bitsandbytes")).model
    loaded = load(folder, "bitsandbytes", {"": "disk"}, store=tmp_path)
    x = torch.randn(3, WIDTH, dtype=resident.scale.dtype)
    assert torch.equal(loaded.model(x), resident(x))
    assert loaded.dispatch is not None and set(loaded.dispatch.bytes_at_rest()) == {"cpu", "disk"}
    assert loaded.dispatch.bytes_at_rest()["cpu"] < 10_000  # tensors of the model itself


def test_map_of_a_pipeline_has_entries_of_one_component() -> None:
    names = ["transformer", "text_encoder", "text_encoder_2"]
    written = {"transformer.blocks.0": "disk", "": "cpu", "text_encoder_2": "disk", "transformer.out": "cpu"}
    assert entries_of(written, "transformer", names) == {"": "cpu", "blocks.0": "disk", "out": "cpu"}
    assert entries_of(written, "text_encoder", names) == {"": "cpu"}
    assert entries_of(written, "text_encoder_2", names) == {"": "disk"}
    # a model of one component has its own names, whatever they begin with
    assert entries_of({"model.layers.0": "disk"}, "model", ["model"]) == {"model.layers.0": "disk"}
    assert entries_of("auto", "transformer", names) == "auto"
