import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from qexp.config.generate import GenerateConfig, for_images
from qexp.config.schema import IsolationConfig
from qexp.errors import ConfigError
from qexp.models.digits import Config, Source
from qexp.models.digits_network import DigitsConfig, DigitsTransformer
from qexp.tasks.context import RunContext
from qexp.tasks.generate import TaskResult, run_generate
from tests.tasks.contexts import context_of

CPU = torch.device("cpu")
NO_MEMORY = (0.0, 0.0)


class Sampler(Source):
    """A stand-in source whose steps take a given time and change one state in place."""

    def __init__(self, seconds: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(Config())
        self.seconds = seconds
        self.dtype = dtype

    def generate(
        self,
        models: Any,
        task: GenerateConfig,
        *,
        seed: int,
        device: torch.device,
        on_step: Callable[[int, Tensor], None],
    ) -> dict[str, Tensor]:
        state = torch.zeros(task.num_images, 1, 8, 8, dtype=self.dtype)
        for step in range(1, task.num_inference_steps + 1):
            time.sleep(self.seconds)
            on_step(step, state.add_(seed))
        return {"images": state.float(), "labels": torch.arange(task.num_images)}


def run_sampler(sampler: Any = None, device: str = "cpu", memory: Any = lambda: NO_MEMORY, **task: Any) -> TaskResult:
    config = for_images(GenerateConfig(**task))
    return run_generate(context_of(config, source=sampler or Sampler(), seed=2, device=device, memory=memory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_trajectory_keeps_each_state_although_the_sampler_reuses_it(dtype: torch.dtype) -> None:
    result = run_sampler(Sampler(dtype=dtype), num_images=2, num_inference_steps=3)
    trajectory = result.outputs["trajectory"]
    assert trajectory.shape == (3, 2, 1, 8, 8) and trajectory.dtype == torch.float32
    assert trajectory[:, 0, 0, 0, 0].tolist() == [2, 4, 6]
    assert set(result.outputs) == {"images", "labels", "trajectory"}


def test_rows_hold_step_time_and_memory() -> None:
    readings = iter([(1.0, 0.5), (2.0, 0.25), (3.0, 0.125)])
    result = run_sampler(memory=lambda: next(readings), num_inference_steps=3)
    assert [list(row) for row in result.rows] == [["step", "step_ms", "host_gib", "device_gib"]] * 3
    assert [(row["step"], row["host_gib"], row["device_gib"]) for row in result.rows] == [
        (1, 1.0, 0.5),
        (2, 2.0, 0.25),
        (3, 3.0, 0.125),
    ]


@pytest.mark.parametrize("mode", ["process", "inline"])
def test_rows_have_no_memory_of_a_process_that_is_not_the_experiments_own(mode: str) -> None:
    config: Any = SimpleNamespace(isolation=IsolationConfig(mode=mode))
    recorder = RunContext(config, cast(Any, None), torch.device("cpu"), Path(), {}).recorder("generate", 1)
    recorder.begin()
    recorder.on_step(1, None)
    assert list(recorder.rows[0]) == ["step", "step_ms", *["host_gib"][mode == "inline" :], "device_gib"]


def test_times_are_of_the_steps_and_not_of_the_recording() -> None:
    readings = iter([0.0, 0.2, 0.0])

    def slow_memory() -> tuple[float, float]:
        time.sleep(next(readings))
        return NO_MEMORY

    result = run_sampler(Sampler(seconds=0.02), memory=slow_memory, num_inference_steps=3)
    times_ms = [row["step_ms"] for row in result.rows]
    assert all(20 <= value < 180 for value in times_ms)
    first, *others = times_ms  # which warms up, and is not among the others
    assert result.metrics["time/step_ms"] == pytest.approx(sum(others) / 2)
    assert result.metrics["time/first_step_ms"] == first and result.metrics["time/measured_steps"] == 2
    spread = result.metrics["time/step_ms_min"], result.metrics["time/step_ms_max"]
    assert spread == (min(others), max(others))
    assert result.metrics["time/total_seconds"] >= 3 * 0.02 + 0.2


def test_an_accelerator_is_waited_for_before_each_reading_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    run_sampler(num_inference_steps=4)
    assert waited == []
    run_sampler(device="cuda:0", num_inference_steps=4)
    assert waited == [torch.device("cuda:0")] * 5


def test_progress_goes_to_a_log_in_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    run_sampler(num_inference_steps=20)
    steps = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert steps == [f"generating step {step}/20" for step in (5, 10, 15, 20)]


def test_progress_rewrites_one_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_sampler(num_inference_steps=3)
    text = capsys.readouterr().err
    assert text.count("\r") == 3 and text.count("\n") == 1 and text.endswith("\n")


def test_digits_end_where_their_trajectory_ends() -> None:
    torch.manual_seed(0)
    model = DigitsTransformer(DigitsConfig(width=32, depth=1, heads=2)).eval()
    task = GenerateConfig(num_images=10, num_inference_steps=4, guidance_scale=2.0)
    results = [
        run_generate(context_of(task, source=Source(Config()), models={"transformer": model}, seed=1)) for _ in range(2)
    ]
    images, trajectory = results[0].outputs["images"], results[0].outputs["trajectory"]
    assert trajectory.shape == (4, 10, 1, 8, 8) and torch.equal(trajectory[-1].clamp(-1, 1), images)
    assert torch.equal(trajectory, results[1].outputs["trajectory"])


@pytest.mark.parametrize(
    ("field", "value"), [("num_images", 0), ("num_inference_steps", 0), ("guidance_scale", float("nan"))]
)
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"task\.{field}={value}"):
        GenerateConfig(**{field: value})  # type: ignore[arg-type]
