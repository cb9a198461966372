"""The parts of `scripts/gpu_check`: isolation of checks, what is counted, the arithmetic of the targets."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_checks import __main__ as command
from gpu_checks import speed
from gpu_checks.accelerator import Accelerator
from gpu_checks.checks import Checks, DeviceLost, Row
from gpu_checks.loading import same_bytes
from gpu_checks.subjects import Net, batches
from gpu_checks.transfers import Transfers
from qexp.errors import MissingLibraryError, UnsupportedError
from qexp.offloading.payload import leaves
from tests.offloading import model_zoo as zoo


def collect(deadline: float = 1e12, **options: Any) -> tuple[Checks, list[str], list[Row]]:
    begun: list[str] = []
    rows: list[Row] = []
    return Checks(begun.append, rows.append, deadline=deadline, **options), begun, rows


def fail_with(error: Exception) -> Callable[[], Any]:
    def check() -> Any:
        raise error

    return check


def test_a_check_is_a_row_whatever_it_does() -> None:
    checks, begun, rows = collect(done=["a: old"])
    checks.run("a", "old", fail_with(AssertionError("not run again")))
    checks.run("a", "good", lambda: ({"x_bytes": 1}, []))
    checks.run("a", "rules", lambda: ({}, ["one rule", "another"]))
    checks.run("a", "raises", fail_with(ValueError("a long\n  story")))
    checks.run("a", "hardware", fail_with(UnsupportedError("needs another GPU")))
    checks.run("a", "library", fail_with(MissingLibraryError("pip install it")))
    assert begun == ["a: good", "a: rules", "a: raises", "a: hardware", "a: library"]
    assert [row.status for row in rows] == ["passed", "failed", "failed", "unsupported", "failed"]
    assert rows[0].numbers == {"x_bytes": 1} and rows[1].message == "one rule; another"
    assert rows[2].message.startswith("ValueError: a long story [test_parts.py:")


def test_out_of_time_and_a_lost_device() -> None:
    checks, begun, rows = collect(deadline=time.monotonic() - 1)
    checks.run("a", "late", fail_with(AssertionError()))
    assert begun == [] and (rows[0].status, rows[0].message) == ("skipped", "out of time")
    checks, _, rows = collect(device_works=lambda: False)
    checks.run("a", "fine", lambda: ({}, []))
    with pytest.raises(DeviceLost):
        checks.run("a", "illegal access", fail_with(RuntimeError("CUDA error")))
    assert [row.status for row in rows] == ["passed", "failed"]


@pytest.mark.parametrize("kind", ["fp32", "torchao_int8wo", "quanto_int4", "conf/gguf", "conf/packed_uint4"])
def test_transfers_of_every_inner_tensor_are_counted(kind: str) -> None:
    """With the meta device for an accelerator: copies to it are dispatched like any other."""
    weight = zoo.make(kind).embed.weight.data
    expected = leaves(weight)
    with Transfers() as seen:
        weight.to("meta")
        torch.empty(10, device="meta").copy_(torch.ones(10), non_blocking=True)
        torch.ones(10).copy_(torch.ones(10))
        torch.ones(10).to(torch.float64)
    assert seen.h2d_copies == len(expected) + 1
    assert seen.h2d_bytes == sum(leaf.nbytes for leaf in expected) + 40
    assert seen.d2h_bytes == seen.d2h_copies == 0


def test_bytes_are_compared_whatever_their_dtype() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bytes([nan], [nan.clone()])
    assert not same_bytes([nan], [nan.double()])
    assert not same_bytes([nan, nan], [nan])
    assert not same_bytes([torch.tensor([0.0])], [torch.tensor([-0.0])])


def test_memory_is_what_was_asked_for_where_the_allocator_tells() -> None:
    accelerator = Accelerator("cpu")
    assert accelerator.allocated_bytes() == 0
    told = {"requested_bytes.all.current": 5, "requested_bytes.all.peak": 7, "allocated_bytes.all.current": 512}
    calls: list[str] = []
    accelerator.module = SimpleNamespace(
        memory_stats=lambda device: told,
        memory_allocated=lambda device: 512,
        max_memory_allocated=lambda device: 1024,
        reset_peak_memory_stats=lambda device: calls.append("reset"),
        synchronize=lambda device: calls.append("synchronize"),
    )
    with accelerator.peak() as peak:
        assert (accelerator.allocated_bytes(), peak()) == (5, 7)
    told.clear()
    assert (accelerator.allocated_bytes(), peak()) == (512, 1024)
    assert calls == ["synchronize", "reset"]


def race(*, resident: float, ours: float | None, peers: dict[str, float], payload: int = 0, rate: float = 1.0) -> Any:
    """A race whose median step times, in seconds, are these."""
    made: Any = object.__new__(speed.Race)
    made.modes = {speed.RESIDENT: speed.Mode(speed.resident, [resident, resident, 100.0])}
    if ours is not None:
        made.modes[speed.STREAMED_BLOCK] = speed.Mode(speed.resident, [ours, ours, 100.0], [1.0])
        made.modes[speed.STREAMED_BLOCK].numbers = {"payload_bytes": payload}
    for name, step in peers.items():
        made.modes[f"diffusers {name}"] = speed.Mode(speed.resident, [step])
    made.bytes_per_second = [rate / 2, rate, rate * 2]
    made.accelerator = type("Device", (), {"has_streams": True})
    return made


@pytest.mark.parametrize(
    ("resident", "payload", "ours", "near"),
    [(1.0, 2, 2.2, "passed"), (1.0, 2, 2.21, "failed"), (3.0, 2, 3.3, "passed"), (3.0, 2, 3.4, "failed")],
)
def test_the_bound_is_the_longer_of_computing_and_copying(
    resident: float, payload: int, ours: float, near: str
) -> None:
    rows = speed.targets(race(resident=resident, ours=ours, peers={"leaf": 10.0}, payload=payload), small=False)
    assert rows[0].status == near
    assert rows[0].numbers["bound_ms"] == 1000 * max(resident, payload)
    assert rows[0].numbers["ratio"] == pytest.approx(ours / max(resident, payload), abs=1e-4)


def test_the_peer_is_represented_by_its_best_mode() -> None:
    rows = speed.targets(race(resident=1, ours=2, peers={"leaf": 9.0, "block stream": 2.6, "block": 4.0}), small=False)
    assert (rows[1].status, rows[1].numbers["best_mode"]) == ("passed", "diffusers block stream")
    rows = speed.targets(race(resident=1, ours=2, peers={"leaf": 9.0, "block": 2.59}), small=False)
    assert rows[1].status == "failed" and rows[1].message == "the ratio is 1.295"
    assert speed.targets(race(resident=1, ours=2, peers={}), small=False)[1].status == "skipped"
    assert [row.status for row in speed.targets(race(resident=1, ours=None, peers={}), small=False)] == ["skipped"] * 2
    assert [row.status for row in speed.targets(race(resident=1, ours=2, peers={}), small=True)] == ["unsupported"] * 2


def test_the_command_says_that_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(tmp_path / "out.json")])
    monkeypatch.setattr(command, "has_cuda", lambda: False)
    assert command.main() == command.NO_GPU == 3
    assert "no CUDA device" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_inputs_have_outliers_and_answers_depend_on_every_input() -> None:
    one, other = batches(32, 2, torch.float32)
    assert one[:, 3].abs().max() > 6 and not torch.equal(one, other)
    model = Net(32, 2)
    with torch.no_grad():
        assert not torch.equal(model(one), model(other))
