"""Weights that stay as they are in their file are mapped on a CPU: the same answers, and nothing is copied."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config.schema import LoaderConfig
from qexp.errors import ConfigError
from qexp.loading.component import LoadedComponent
from qexp.loading.mapping import choose_mapped
from qexp.loading.saving import save_model
from qexp.offloading.payload import leaves, sites
from tests.backends import BACKENDS, EVERY_WAY, same_bytes
from tests.loading.toys import Toy, answer_of, load_toy, prepare_toy, random_state, save_state, settings
from tests.products import representatives

MIB = 1 << 20


def saved(folder: Path, backend: str = "none") -> Path:
    """A toy model as qexp saves it, in bf16."""
    dense = save_state(folder / "dense", random_state(Toy))
    save_model(load_toy(dense, settings(backend, compute_dtype="bfloat16")).model, folder / backend)
    return folder / backend


def load(folder: Path, setting: bool | str, build: Any = Toy, **fields: Any) -> LoadedComponent:
    loader = LoaderConfig(in_flight_mib=1, workers=2, map=setting)
    return load_toy(folder, settings("none", compute_dtype="bfloat16", **fields), build, loader=loader)


def mapped_bytes(loaded: LoadedComponent) -> int:
    return sum(entry.nbytes for item in loaded.plan.items for entry in item.mapped)


def all_leaves(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}.{number}": leaf
        for path, module in model.named_modules()
        for store, name in sites(module)
        for number, leaf in enumerate(leaves(store[name]))
    }


@pytest.mark.parametrize("backend", EVERY_WAY)
def test_model_is_that_of_a_copy_bit_by_bit(backend: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, backend)
    mapped, copied = load(folder, "auto"), load(folder, False)
    assert mapped_bytes(copied) == 0
    # all but biases, the norms' fp32 in some formats, and scales of odd sizes
    assert mapped_bytes(mapped) > 0.8 * sum(item.nbytes for item in mapped.plan.items)
    own, other = all_leaves(mapped.model), all_leaves(copied.model)
    assert own.keys() == other.keys() and all(same_bytes(own[name], other[name]) for name in own)
    assert torch.equal(answer_of(mapped.model), answer_of(copied.model))


@pytest.mark.parametrize("backend", representatives(BACKENDS, ["none", "bitsandbytes_nf4_dq", "torchao"]))
def test_file_of_another_layout_gives_the_same_bits(backend: str, tmp_path: Path) -> None:
    """Its tensors begin 8 bytes behind a multiple of 64, as in most files that the library writes."""
    folder = saved(tmp_path, backend)
    expected = answer_of(load(folder, False).model)
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        padded = (length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :]
        file.write_bytes(padded)
        shifted = load(folder, "auto")
        assert mapped_bytes(shifted) < 64  # numbers of odd sizes, which may happen to be aligned
        assert torch.equal(answer_of(shifted.model), expected)


def test_weights_that_change_are_not_mapped(tmp_path: Path) -> None:
    """Cast to another dtype, or quantized: they are read."""
    folder = save_state(tmp_path, random_state(Toy))
    assert mapped_bytes(load(folder, "auto", skip_modules=())) == 0
    assert mapped_bytes(load_toy(folder, settings("torchao", compute_dtype="bfloat16"))) == 0
    in_fp32 = load(folder, "auto", keep_in_fp32_modules=("head",))
    assert {item.target for item in in_fp32.plan.items if item.mapped} <= {"head.weight", "head.bias"}


def test_nothing_is_mapped_onto_an_accelerator(tmp_path: Path) -> None:
    prepared = prepare_toy(saved(tmp_path, "torchao"), settings("none", compute_dtype="bfloat16"))
    plan = prepared.plan.placed(lambda target: torch.device("cuda"))
    assert not any(item.mapped for item in choose_mapped(plan, prepared.quantizer, "auto", "toy").items)
    assert any(item.mapped for item in choose_mapped(prepared.plan, prepared.quantizer, "auto", "toy").items)


def test_changes_in_place_stay_in_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = next(folder.glob("*.safetensors"))
    content, model = file.read_bytes(), load(folder, "auto").model
    before = answer_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.shift.zero_()  # type: ignore[operator]
    assert not torch.equal(answer_of(model), before)
    assert file.read_bytes() == content
    assert torch.equal(answer_of(load(folder, "auto").model), before)


class Twins(nn.Module):
    """Two buffers that are one tensor."""

    first: Tensor
    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        table = torch.zeros(64, 64)
        self.register_buffer("first", table)
        self.register_buffer("second", table)


def test_two_names_of_one_tensor_are_as_much_one_piece_of_memory_as_in_a_copy(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in random_state(Twins).items() if name != "second"}
    save_model(load(save_state(tmp_path / "dense", state), False, Twins).model, tmp_path / "saved")
    for setting in ("auto", False):
        model: Any = load(tmp_path / "saved", setting, Twins).model
        model.first.fill_(1)
        assert model.second.sum() == 0, setting


@pytest.mark.parametrize("backend", ["none", "bitsandbytes_nf4_dq", "quanto_int4"])
def test_mapped_model_can_be_offloaded_dequantized_and_saved_elsewhere(backend: str, tmp_path: Path) -> None:
    import qexp

    folder = saved(tmp_path, backend)
    model = load(folder, "auto").model
    expected = answer_of(model)
    offload = qexp.offload(model, "leaf", device="cpu", to="disk", folder=tmp_path / "offload")
    assert torch.equal(answer_of(model), expected)
    offload.remove()
    qexp.save(model, tmp_path / "again")
    assert torch.equal(answer_of(load(tmp_path / "again", "auto").model), expected)


def test_true_says_what_is_not_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(saved(tmp_path, "torchao"), "auto")
    assert "loader.map" not in capsys.readouterr().err
    load(tmp_path / "torchao", True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "loader.map=true" in line]
    assert "MiB are mapped" in line and "not aligned in their file" in line


@pytest.mark.parametrize("setting", ["on", 1, None, "true"])
def test_setting_is_one_of_three(setting: Any) -> None:
    with pytest.raises(ConfigError, match=r"loader\.map=.* must be auto, true or false"):
        LoaderConfig(map=setting)


@pytest.mark.own_process
def test_memory_of_mapped_weights_is_the_files(tmp_path: Path) -> None:
    """16 MiB of 4-bit weights: a load of them takes none of its own, and the pages that are used are the file's."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(2))

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Wide().state_dict().items()}
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    dense = save_state(tmp_path / "dense", state)
    save_model(load_toy(dense, settings("bitsandbytes"), Wide).model, tmp_path / "saved")
    copied, mapped = load(tmp_path / "saved", False, Wide), load(tmp_path / "saved", "auto", Wide)
    assert copied.memory.peak_anon_bytes > 15 * MIB
    assert mapped.memory.peak_anon_bytes < 4 * MIB
    assert mapped.memory.peak_bytes < copied.memory.peak_bytes + 8 * MIB


def test_plan_of_a_spread_model_is_read(tmp_path: Path) -> None:
    """What travels is packed, and its first copy would be the mapping's."""
    folder = saved(tmp_path, "torchao")
    spread = {"device_map": {"": "cpu", "blocks": "disk"}, "store": tmp_path / "offload"}
    loaded = load_toy(folder, settings("none", compute_dtype="bfloat16"), **spread)
    assert mapped_bytes(loaded) == 0
    assert torch.equal(answer_of(loaded.model), answer_of(load(folder, "auto").model))


def test_changed_file_is_noticed_at_the_end_of_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qexp.errors import LoadError
    from qexp.loading import weights

    folder = saved(tmp_path)
    file = next(folder.glob("*.safetensors"))
    check = weights.check_finite

    def check_and_touch(name: str, tensor: Tensor) -> None:
        check(name, tensor)
        os.utime(file)

    monkeypatch.setattr(weights, "check_finite", check_and_touch)
    with pytest.raises(LoadError, match="was changed since its header was read; load it again"):
        load(folder, "auto")


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao", "quanto_int4", "packed_uint4", "gguf"])
def test_stored_weights_wait_for_no_kernels_that_quantize(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qexp.quantizers.cpu_kernels import loops

    folder, called = saved(tmp_path, backend), []
    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "__call__", lambda self, *_: called.append(self.function.__name__))
        model = load(folder, "auto").model
    assert called == []
    answer_of(model)
