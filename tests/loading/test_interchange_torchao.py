"""Every class of torchao that its files can carry and a CPU can run: diffusers and this program write the same bytes.

torchao refuses to quantize activations to float8 without a GPU though its tensors run on CPUs; that gate is patched
open here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qexp.errors import LoadError, UnsupportedError
from qexp.loading.saving import save_model
from qexp.quantizers.torchao import TorchAoConfig
from tests.backends import backend_config
from tests.loading.test_interchange import (
    assert_same_answer,
    assert_same_files,
    dense,
    embedded,
    load_theirs,
    load_tiny,
)
from tests.products import representatives
from tests.quantizers.kinds import DYNAMIC_INTX, INTX, ao

__all__ = ["dense"]  # a fixture

QUIET = {"set_inductor_config": False}


def nvfp4(lib: Any) -> Any:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


# our config, and the one that `torchao.quantization` (the argument of the functions) has for the same
CASES: dict[str, tuple[TorchAoConfig, Callable[[Any], Any]]] = {
    "int8wo tensor": (
        ao("int8wo", granularity="PerTensor"),
        lambda lib: lib.Int8WeightOnlyConfig(granularity=lib.PerTensor(), **QUIET),
    ),
    "int8wo groups": (ao("int8wo", 32), lambda lib: lib.Int8WeightOnlyConfig(granularity=lib.PerGroup(32), **QUIET)),
    "int8dq tensor": (
        ao("int8dq", granularity="PerTensor"),
        lambda lib: lib.Int8DynamicActivationInt8WeightConfig(granularity=lib.PerTensor(), **QUIET),
    ),
    "int8dq mixed, asymmetric": (
        ao("int8dq", granularity=["PerRow", "PerTensor"], act_mapping_type="asymmetric", reduce_range=True),
        lambda lib: lib.Int8DynamicActivationInt8WeightConfig(
            granularity=[lib.PerRow(), lib.PerTensor()],
            act_mapping_type=lib.MappingType.ASYMMETRIC,
            reduce_range=True,
            **QUIET,
        ),
    ),
    "float8wo tensor": (
        ao("float8wo_e4m3", granularity="PerTensor"),
        lambda lib: lib.Float8WeightOnlyConfig(granularity=lib.PerTensor(), **QUIET),
    ),
    "float8wo e5m2 groups": (
        ao("float8wo", 32),
        lambda lib: lib.Float8WeightOnlyConfig(torch.float8_e5m2, granularity=lib.PerGroup(32), **QUIET),
    ),
    "float8dq tensor": (ao("float8dq"), lambda lib: lib.Float8DynamicActivationFloat8WeightConfig(**QUIET)),
    "float8dq row": (
        ao("float8dq_e4m3_row"),
        lambda lib: lib.Float8DynamicActivationFloat8WeightConfig(granularity=lib.PerRow(), **QUIET),
    ),
    "int4dq": (ao("int4dq"), lambda lib: lib.Int8DynamicActivationIntxWeightConfig(torch.int4)),
    "int4dq asymmetric": (
        ao("int8_dynamic_activation_int4_weight", group_size=64, mapping_type="ASYMMETRIC"),
        lambda lib: lib.Int8DynamicActivationIntxWeightConfig(torch.int4, lib.PerGroup(64), lib.MappingType.ASYMMETRIC),
    ),
    "int2dq row": (
        ao(DYNAMIC_INTX, weight_dtype="int2", weight_granularity={"_type": "PerAxis", "axis": 0}),
        lambda lib: lib.Int8DynamicActivationIntxWeightConfig(torch.int2, lib.PerAxis(0)),
    ),
    **{
        f"intx {bits}": (
            ao(INTX, weight_dtype=f"torch.int{bits}", group_size=32),
            lambda lib, bits=bits: lib.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), lib.PerGroup(32)),
        )
        for bits in (2, 5, 8)
    },
    "intx row, fp32 scale": (
        ao(INTX, weight_dtype="int4", scale_dtype="float32"),
        lambda lib: lib.IntxWeightOnlyConfig(torch.int4, scale_dtype=torch.float32),
    ),
    "intx hqq": (
        ao(INTX, 64, weight_dtype="int4", intx_choose_qparams_algorithm="hqq_scale_only"),
        lambda lib: lib.IntxWeightOnlyConfig(
            torch.int4,
            lib.PerGroup(64),
            intx_choose_qparams_algorithm=lib.quant_api.IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        ),
    ),
    "nvfp4": (ao("NVFP4WeightOnlyConfig"), nvfp4),
    "by name": (
        ao("FqnToConfig", fqn_to_config={"first": "int8wo", "re:sec.*": "int4dq"}),
        lambda lib: lib.FqnToConfig(
            {
                "first": lib.Int8WeightOnlyConfig(**QUIET),
                "re:sec.*": lib.Int8DynamicActivationIntxWeightConfig(torch.int4),
            }
        ),
    ),
}


@pytest.fixture(autouse=True)
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        return dict(file.metadata())


# Every class of tensors, each with scales of one kind at least, and what is chosen by an argument of its own.
KEPT = (
    "int8wo groups", "int8dq mixed, asymmetric", "float8wo tensor", "float8dq row", "int4dq asymmetric", "int2dq row",
    "intx 5", "intx row, fp32 scale", "nvfp4", "by name",
)  # fmt: skip


@pytest.mark.parametrize("case", representatives(CASES, KEPT))
def test_both_programs_write_and_read_the_same(case: str, dense: Path, tmp_path: Path) -> None:
    import diffusers
    import torchao.quantization

    config, upstream = CASES[case]
    ours = load_tiny(dense, config, skip=("plain",))
    theirs = load_theirs(
        dense, diffusers.TorchAoConfig(upstream(torchao.quantization), modules_to_not_convert=["plain"])
    )
    save_model(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert metadata(tmp_path / "ours") == metadata(tmp_path / "theirs")
    assert embedded(tmp_path / "ours") == embedded(tmp_path / "theirs")
    assert_same_answer(ours, theirs)
    reloaded = load_tiny(tmp_path / "theirs", backend_config("none"))
    assert_same_answer(reloaded, theirs)
    save_model(reloaded, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "ours")
    assert embedded(tmp_path / "again") == embedded(tmp_path / "ours")
    assert_same_answer(load_theirs(tmp_path / "ours"), ours)


@pytest.mark.parametrize("case", ["int8wo groups", "float8wo tensor", "int4dq", "intx row, fp32 scale", "nvfp4"])
def test_stored_weights_compute_in_the_dtype_that_is_asked_for(case: str, dense: Path, tmp_path: Path) -> None:
    """Those of diffusers keep the dtype that they were quantized from, and fail in a model of another."""
    save_model(load_tiny(dense, CASES[case][0], skip=("plain",)), tmp_path / "ours")
    narrow, wide = (
        load_tiny(tmp_path / "ours", backend_config("none"), dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    assert wide.first.weight.dtype == torch.float32
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, near = wide(x), narrow(x.bfloat16())
    assert exact.dtype == torch.float32
    assert (near - exact).norm() / exact.norm() < 0.03
    stored, cast = (model.first.weight.dequantize() for model in (narrow, wide))
    assert cast.dtype == torch.float32
    assert (cast - stored).abs().max() < 0.05


def test_weights_that_do_not_run_here_are_refused_when_they_are_read(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(load_tiny(dense, CASES["float8dq row"][0], skip=("plain",)), tmp_path / "ours")
    load_tiny(tmp_path / "ours", backend_config("none"))

    def no_kernel(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", no_kernel)
    with pytest.raises(UnsupportedError, match=r"float8dq_e4m3_row weights, which do not run on cpu: no kernel image;"):
        load_tiny(tmp_path / "ours", backend_config("none"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"_type": "Int8Tensor"', '"_type": "Int7Tensor"', "cannot be assembled: .*Int7Tensor"),
        ('"block_size": [1, 32]', '"block_sizes": [1, 32]', "cannot be assembled"),
        ("{", "[", "metadata for 'first.weight' is not a JSON object"),
    ],
)
def test_damaged_metadata_is_found(old: str, new: str, message: str, dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(load_tiny(dense, CASES["int8wo groups"][0], skip=("plain",)), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    described = metadata(tmp_path)
    assert old in described["first.weight"]
    save_file(load_file(file), file, {**described, "first.weight": described["first.weight"].replace(old, new, 1)})
    with pytest.raises(LoadError, match=message):
        load_tiny(tmp_path, backend_config("none"))
