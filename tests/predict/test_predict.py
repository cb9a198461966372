"""Predictions: what a load of the same model then takes, to the byte, and what offloading then keeps on a device."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest

import qexp
from qexp.config.offload import OffloadConfig
from qexp.loading import forecast as forecasts
from qexp.loading.forecast import LOADING_BYTES, ComponentForecast, OffloadForecast, forecast_offload
from qexp.models import architectures
from qexp.predict import __main__ as command
from qexp.predict.__main__ import forecast, main, published_overrides
from qexp.predict.tables import ModelForecast
from qexp.system.screen import say
from tests.assigning import commands_assign as commands_assign
from tests.fresh_process import imported_by
from tests.products import diagonal, representatives
from tests.scripts.test_make_checkpoint import TINY

pytestmark = pytest.mark.usefixtures("commands_assign")

T5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1,
      "num_heads": 4, "vocab_size": 100, "feed_forward_proj": "gated-gelu"}  # fmt: skip
TRANSFORMER = {
    **TINY, "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12], "in_channels": 64, "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}  # fmt: skip
INDEX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
MIB = 1 << 20


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published model of no size, whose components are on disk as well."""
    described = {
        "repository": "nobody/tiny", "source": "nowhere", "license": "none", "gated": False, "model_index": INDEX,
        "scheduler": {},
        "components": {
            name: {"parameters": 1, "dtype": "bfloat16", "max_shard_gb": 5, "config": config}
            for name, config in (("transformer", TRANSFORMER), ("text_encoder", T5))
        },
    }  # fmt: skip
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "tiny.json").write_text(json.dumps(described))
    monkeypatch.setattr(architectures, "ASSETS", tmp_path / "assets")
    architectures.architecture.cache_clear()
    make_checkpoint.write_architecture(tmp_path / "tiny", "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    ("option", "component", "dtype"),
    representatives(
        product(
            ["none", "bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "gguf_q4_0", "packed_uint3"],
            ["transformer", "text_encoder"],
            ["bfloat16", "float16"],
        ),
        [
            ("bitsandbytes", "transformer", "bfloat16"),
            ("bitsandbytes_int8", "text_encoder", "bfloat16"),
            ("gguf_q4_0", "text_encoder", "float16"),
            ("packed_uint3", "transformer", "float16"),
        ],
    ),
)
def test_published_model_takes_what_a_load_takes(tiny: Path, component: str, option: str, dtype: str) -> None:
    found = forecast("tiny", published_overrides("tiny", dtype), [option]).columns[option][component]
    model = qexp.load(tiny / component, option, device="cpu", compute_dtype=dtype)
    assert found.result_bytes == qexp.memory_footprint(model)
    assert found.loading_bytes > found.result_bytes + LOADING_BYTES


@pytest.mark.parametrize(
    ("strategy", "option"),
    diagonal(["leaf", "block", "sequential"], ["none", "bitsandbytes", "torchao", "gguf_q4_0"]),
)
def test_offloaded_model_keeps_on_the_device_what_was_predicted(strategy: str, option: str) -> None:
    strategies = forecast("digits", ["model=digits"], [option]).offload[option]
    model = qexp.load("digits", option, device="cpu")
    offload = qexp.offload(model, strategy, device="cpu", to="cpu")
    statistics = offload.statistics()
    # slots: two where copies run on a stream, as on an accelerator; here, on a CPU without one, a single one
    slots = 2 if strategy != "sequential" else 1
    device = statistics["offload/resident_gib"] + slots * statistics["offload/ring_gib"]
    assert strategies[strategy].device == pytest.approx(device * (1 << 30), rel=0.01)  # but for padding of leaves
    assert strategies[strategy].host == pytest.approx(statistics["offload/payload_gib"] * (1 << 30), rel=0.01)


def test_components_take_turns_or_keep_their_slots() -> None:
    def part(result: int, groups: list[int], waits: bool = False) -> ComponentForecast:
        strategies = {"model": [sum(groups)], "block": groups, "leaf": groups, "sequential": groups}
        return ComponentForecast(1, 1, result * MIB, 10 * MIB, {k: [g * MIB for g in v] for k, v in strategies.items()},
                                 waits, (), {}, {})  # fmt: skip

    first, second = part(100, [60, 30]), part(50, [20, 20, 5])
    found = dict(forecast_offload([first, second], OffloadConfig(), [False, False]))
    # resident: 150; loading adds the largest dense tensor, 10, and 128
    assert (found["none"].device, found["none"].loading) == (150 * MIB, 288 * MIB)
    # whole components: 10 + 5 stay, and the larger of 90 and 45 is there; the second one is loaded beside 10
    assert (found["model"].device, found["model"].loading) == (105 * MIB, (100 + 138) * MIB)
    # two slots each of the largest group: 10 + 120, 5 + 40
    assert (found["block"].device, found["block"].host) == (175 * MIB, 135 * MIB)
    assert found["block"].loading == (10 + 120 + 50 + 138) * MIB
    assert found["sequential"].device == (10 + 60 + 5 + 20) * MIB
    one_slot = dict(forecast_offload([first, second], OffloadConfig(use_stream=False), [False, False]))
    assert one_slot["block"].device == found["sequential"].device
    # a component that is not quantized is loaded to the host; one that is calibrated stays until all are there
    assert dict(forecast_offload([first, second], OffloadConfig(), [True, True]))["block"].loading == 175 * MIB
    waiting = [part(100, [60, 30], waits=True), second]
    assert dict(forecast_offload(waiting, OffloadConfig(), [False, False]))["leaf"].loading == (100 + 50 + 138) * MIB


def test_flux_in_nf4_by_hand() -> None:
    found = forecast("flux_dev", published_overrides("flux_dev", "bfloat16"), ["bitsandbytes"])
    part = found.columns["bitsandbytes"]["transformer"]
    from torch import nn

    network = architectures.network(architectures.component_of("flux_dev", "transformer").config)
    linear = sum(  # all weights of linear layers are multiples of 64: half a byte each, and 4 bytes for 64 of them
        module.in_features * module.out_features for module in network.modules() if isinstance(module, nn.Linear)
    )
    dense = 11_901_408_320 - linear
    extra = part.result_bytes - dense * 2 - linear // 2 - linear // 64 * 4
    assert 0 <= extra <= 128 * len(part.quantized)  # the 16 levels of each weight
    assert not part.skipped
    assert part.parameters == 11_901_408_320 and part.file_bytes == 2 * part.parameters


def test_overrides_show_what_an_experiment_loads(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder, with a backend and patterns for one component: as a load of each component with the same settings."""
    (tiny / "scheduler").mkdir(exist_ok=True)
    (tiny / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    overrides = ["model=diffusers", f"model.path={tiny}", "skip_modules=[proj_out]"]
    assert (
        main([*overrides, "backend=bitsandbytes", "memory=1GiB", "+backend@components.text_encoder.backend=torchao"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    quantized = qexp.load(tiny / "transformer", "bitsandbytes", device="cpu", skip_modules=["proj_out"])
    other = qexp.load(tiny / "text_encoder", "torchao", device="cpu")
    sizes = [qexp.memory_footprint(model) / 1024 for model in (quantized, other)]
    cells = {tuple(line.split()[:2]): line.split()[-1] for line in lines if line.startswith("tiny ")}
    assert cells["tiny", "transformer"] == f"{sizes[0]:.2f}" and cells["tiny", "text_encoder"] == f"{sizes[1]:.2f}"
    assert cells["tiny", "total"] == f"{sum(sizes):.2f}"
    assert "files KiB" in lines[0] and "bitsandbytes KiB" in lines[0]
    assert cells["tiny", "fits"] == "resident"
    assert any(re.match(r"leaf .* fits$", line) for line in lines)


def test_what_does_not_fit_resident_names_the_first_offload_that_does() -> None:
    strategies = {
        "none": OffloadForecast(20, 30, 0), "model": OffloadForecast(10, 12, 20),
        "block": OffloadForecast(problem="no block lists"), "leaf": OffloadForecast(5, 6, 20),
    }  # fmt: skip
    model = ModelForecast("m", (), {"torchao": {}}, {"torchao": strategies})
    for memory, expected in ((30, "resident"), (29, "offload=model"), (11, "offload=leaf"), (5, "nothing")):
        assert command.weights_table([model], ["torchao"], "KiB", memory)[-1][-1] == expected


def test_skip_patterns_of_a_component_leave_its_weights_dense(tiny: Path) -> None:
    plain = forecast("tiny", published_overrides("tiny", "bfloat16"), ["torchao"]).columns["torchao"]
    skipping = [*published_overrides("tiny", "bfloat16"), "+components.transformer.skip_modules=[proj_out]"]
    other = forecast("tiny", skipping, ["torchao"]).columns["torchao"]
    assert other["transformer"].result_bytes > plain["transformer"].result_bytes
    assert other["text_encoder"].result_bytes == plain["text_encoder"].result_bytes


def test_a_format_that_cannot_hold_a_component_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.parent / "assets" / "tiny.json"
    described = json.loads(config.read_text())
    described["components"]["text_encoder"]["config"] |= {"d_model": 40, "d_kv": 10, "d_ff": 40}  # no blocks of 32
    config.write_text(json.dumps(described))
    architectures.architecture.cache_clear()
    assert main(["tiny", "--backends", "gguf_q4_0"]) == 0
    printed = capsys.readouterr()
    cells = {tuple(line.split()[:2]): line.split()[-1] for line in printed.out.splitlines() if line.startswith("tiny ")}
    assert cells["tiny", "text_encoder"] == cells["tiny", "total"] == "–" != cells["tiny", "transformer"]
    assert "tiny: text_encoder, backend=gguf_q4_0: " in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sdxl", "model.quantize=[unet]"], "model.quantize=[unet] is an override, and sdxl a published name"),
        (["sdxl", "sdlx"], "sdlx is not a published model (did you mean sdxl?); use flux_dev, "),
        (["sdxl", "--backends", "wan"], "backend=wan is unknown"),
        (["backend=torchoa"], "backend=torchoa is unknown (did you mean torchao"),
        (["digits"], "digits is an option of model=, not a published model; write model=digits"),
        (["backend=nf4"], "backend=nf4 is unknown (did you mean backend=bitsandbytes?)"),
        (["model=digtis"], "model=digtis is unknown (did you mean digits?)"),
        (["memory=16"], "memory=16 has no unit; write memory=16GiB"),
        (["memory=0GiB"], "memory=0GiB must be above 0"),
        (["memory=16Gigs"], "memory=16Gigs is not a size; use bytes, or a size such as 10GiB or 500MB"),
        (["model=digits", "memory="], "memory= is not a size"),
        (["model=digits", "device_map=auto"], "device_map=auto places modules, and predict compares"),
        (["model=diffusers", "model.path=nobody/nothing"], "model.path=nobody/nothing is not on this machine"),
        (["model=diffusers", "model.path=./nothing"], "model.path=./nothing: 'nothing' does not exist"),
        (["model=digits", "skip_modules=[prj_out]"], "skip_modules of 'transformer': the pattern 'prj_out' matches"),
        (["bitsandbytes"], "bitsandbytes is an option of backend=, not a model; write backend=bitsandbytes"),
        (["sdxl", "16GiB"], "16GiB is not a published model; write memory=16GiB for the memory of a device"),
        (["sdxl", "--compute-dtype", "int8"], "compute_dtype=int8 is not a compute dtype"),
        (["."], ". is a path; write model=<kind> model.path=."),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"error: {message}") and not printed.out


def test_what_is_said_of_a_network_is_said_once(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = forecasts.plan_component

    def warned(request: Any) -> Any:
        say(f"{request.component}: a warning")
        return planned(request)

    monkeypatch.setattr(forecasts, "plan_component", warned)
    forecast("tiny", published_overrides("tiny", "bfloat16"), ["bitsandbytes", "torchao"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("a warning")]
    assert sorted(said) == ["tiny: text_encoder: a warning", "tiny: transformer: a warning"]


def test_headers_of_a_published_model_take_no_disk(tiny: Path, tmp_path: Path) -> None:
    architectures.write_headers("tiny", tmp_path / "headers")
    file = tmp_path / "headers" / "transformer" / "diffusion_pytorch_model.safetensors"
    real = next((tiny / "transformer").glob("*.safetensors"))
    assert file.stat().st_size >= real.stat().st_size - 4096 and file.stat().st_blocks * 512 < file.stat().st_size
    shutil.rmtree(tmp_path / "headers")


def test_importing_it_imports_no_torch() -> None:
    assert "torch" not in imported_by("import qexp.predict.__main__")
