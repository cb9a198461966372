"""The table of what runs here: complete, right, and made whatever a backend does to its process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qexp.doctor.__main__ as command
from qexp.config.dataclass_io import to_plain
from qexp.doctor import options, probe, processes
from qexp.doctor.__main__ import main
from qexp.errors import ConfigError
from qexp.quantizers.torchao import TorchAoQuantizer
from qexp.system import child_process
from tests.backends import BACKENDS, backend_config
from tests.products import exhaustive

FIRST = """
import os, time
from qexp.doctor import probe
answer = {"sqnr_db": 1.5, "exact": False, "bits_per_weight": 4.0}
"""
# a probe that answers without torch, but for one option
FAKE = """
def measure(config, dtype, device):
    if config.label == {label!r}:
        {trouble}
    return answer
probe.measure = measure
probe.main()
"""


def fake_probe(monkeypatch: pytest.MonkeyPatch, label: str, trouble: str) -> None:
    code = FIRST + FAKE.format(label=label, trouble=trouble)
    monkeypatch.setattr(processes, "PROBE", [sys.executable, "-c", code])


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    """The rows of `--json`, by option."""
    assert main([*arguments, "--json"]) == 0
    return {row["option"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_configs_are_those_of_the_options() -> None:
    """Which tests/api/test_models.py compares with what the command line composes."""
    files = options.backend_files([])
    assert [path.stem for path in files if path.stem != "mixed"] == BACKENDS
    for path in files:
        assert path.stem == "mixed" or options.backend_config(path) == backend_config(path.stem)


def test_an_option_that_needs_a_recipe_is_tried_by_no_name() -> None:
    assert not [name for name in options.trials([]) if name.startswith("mixed")]
    with pytest.raises(ConfigError, match="backend=mixed needs a recipe"):
        options.trials(["mixed"])


def test_types_without_an_option_are_among_the_trials() -> None:
    assert {"packed_uint4 quant_type=uint5wo", "gguf quant_type=MXFP4"} <= set(options.trials([]))


@pytest.mark.exhaustive
def test_types_without_an_option_are_tried_as_they_are_typed() -> None:
    found = options.trials([])
    for name, config in found.items():
        option, *fields = name.split(" ")
        typed = replace(backend_config(option, *fields), label=config.label)
        assert config.resolved("cpu") == typed.resolved("cpu"), name
    assert len({(config.quant_method, config.label) for config in found.values()}) == len(found)
    assert found["bitsandbytes_fp4 bnb_4bit_use_double_quant=true"].label == "fp4+dq"
    assert list(options.trials(["torchao"])) == ["torchao"]


@pytest.mark.parametrize("names", [["packed_uint4"], exhaustive([])], ids=["one", "every"])
def test_every_option_runs_on_this_cpu(names: list[str]) -> None:
    command = [sys.executable, "-m", "qexp.doctor", *names, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "rows"} and {"python", "torch", "versions", "cpu"} <= set(report["machine"])
    rows = {row["option"]: row for row in report["rows"] if row["device"] == "cpu"}
    wanted = names or BACKENDS
    assert list(rows) == list(options.trials(names)) and set(wanted) <= set(rows)
    assert {name: rows[name]["message"] for name in wanted if rows[name]["status"] != "runs"} == {}
    assert {row["message"] for row in rows.values() if row["status"] == "fails"} == set()
    rows = {name: row for name, row in rows.items() if row["status"] == "runs"}
    keys = {"option", "backend", "label", "device", "status", "reason", "message", "measured", "seconds"}
    assert all(set(row) == keys and set(row["measured"]) == {"bfloat16", "float32"} for row in rows.values())
    uint4 = rows["packed_uint4"]["measured"]["float32"]
    assert uint4["bits_per_weight"] == 4 + 2 * 16 / 64  # codes; scale and offset of a group
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    steps = (weight.view(-1, 64).amax(1) - weight.view(-1, 64).amin(1)) / 15
    noise = steps.square().mean() / 12  # of rounding to steps from the least to the greatest: uniform
    least = 10 * float(torch.log10(weight.square().mean() / noise))
    assert least < uint4["sqnr_db"] < least + 1  # the format searches better steps than these
    if "bitsandbytes" in rows:
        nf4 = rows["bitsandbytes"]["measured"]["bfloat16"]
        assert nf4["bits_per_weight"] == 4 + 32 / 64 + 16 * 32 / (64 * 256)  # codes, absmax a block, the 16 levels
        assert 20 < nf4["sqnr_db"] < 21.5  # 20.7 dB for NF4 of Gaussian weights


def test_unquantized_layer_is_exact_and_has_the_bits_of_its_dtype() -> None:
    measured = probe.attempt(to_plain(backend_config("none")), "cpu", probe.measure)["measured"]
    bits = {"bfloat16": 16.0, "float32": 32.0}
    assert measured == {
        dtype: {"sqnr_db": None, "exact": True, "bits_per_weight": value} for dtype, value in bits.items()
    }


def test_a_missing_library_is_a_need_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide = """
import importlib.metadata as metadata
version = metadata.version
def hidden(name):
    if name == "torchao":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hidden
probe.main()
"""
    monkeypatch.setattr(processes, "PROBE", [sys.executable, "-c", FIRST + hide])
    assert main(["torchao"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "torchao on cpu needs (library): backend.quant_method=torchao needs torchao >= 0.18; found none." in text
    assert "pip install 'torchao>=0.18'" in text and "0 of 1 run" in text


@pytest.mark.parametrize(
    ("trouble", "status", "reason", "words"),
    [
        ("os.kill(os.getpid(), 11)", "fails", "signal", "its process crashed with SIGSEGV in native code"),
        exhaustive("os._exit(3)", "fails", "exit", "its process exited with code 3 before it had a result"),
        exhaustive("time.sleep(60)", "fails", "timeout", "it did not answer within 2 s"),
        ("raise RuntimeError('no\\n kernel')", "fails", "error", "RuntimeError: no kernel"),
        ("os.write(1, b'welcome to this library\\n')", "runs", None, ""),  # as native code prints, past sys.stdout
        exhaustive("import qexp_has_no_such_module", "needs", "library", "No module named 'qexp_has_no_such_module'"),
        ("from qexp.errors import UnsupportedError; raise UnsupportedError('a GPU')", "needs", "unsupported", "a GPU"),
    ],
)
def test_trouble_is_the_row_of_its_option_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
    status: str,
    reason: str | None,
    words: str,
) -> None:
    fake_probe(monkeypatch, "Q4_1", trouble)
    rows = table(capsys, "gguf_q4_0", "gguf_q4_1", "gguf_q5_0", "--timeout", "2")
    row = rows["gguf_q4_1"]
    assert (row["status"], row["reason"]) == (status, reason) and words in str(row["message"])
    assert [rows[name]["status"] for name in ("gguf_q4_0", "gguf_q5_0")] == ["runs", "runs"]


def test_a_probe_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "PROBE", [sys.executable, "-c", "raise SystemExit('no interpreter for this')"])
    row = table(capsys, "gguf_q4_0")["gguf_q4_0"]
    assert row["reason"] == "exit" and str(row["message"]).endswith(": no interpreter for this")


@pytest.mark.parametrize(("line", "received"), [(b'{"begin": "a"}\n', 2), (b'{"end": "a"}\n', 9)])
def test_each_result_starts_the_time_anew(line: bytes, received: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read a second, of one line each, with a timeout of 3 s."""
    seconds, (reading, writing) = count(), os.pipe()
    os.write(writing, 9 * line)
    os.close(writing)
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(child_process, "CHUNK", len(line))
    process: Any = SimpleNamespace(stdout=os.fdopen(reading, "rb"), wait=lambda timeout: 0)
    assert len(list(processes._lines(process, 3))) == received


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torcha"]) == 1
    assert "torcha is not an option of backend= (did you mean torchao" in capsys.readouterr().err


def test_a_gpu_is_tried_as_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_probe(monkeypatch, "Q4_0", "if device == 'cuda:0': raise RuntimeError('no kernel image')")
    monkeypatch.setattr(command, "cuda_device_count", lambda: 2)
    assert main(["gguf_q4_0", "gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["machine"]["devices"]) == ["cpu", "cuda:0", "cuda:1"]
    assert [(row["option"], row["device"], row["status"]) for row in report["rows"]] == [
        ("gguf_q4_0", "cpu", "runs"),
        ("gguf", "cpu", "runs"),
        ("gguf_q4_0", "cuda:0", "fails"),
        ("gguf", "cuda:0", "runs"),
    ]


def test_a_wrong_answer_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = TorchAoQuantizer.dequantize_param
    monkeypatch.setattr(TorchAoQuantizer, "dequantize_param", lambda *arguments: 1.1 * right(*arguments))
    result = probe.attempt(to_plain(backend_config("torchao")), "cpu", probe.measure)
    assert (result["status"], result["reason"], result["measured"]) == ("fails", "error", {})
    assert "differs from that of its dequantized weight" in result["message"]
