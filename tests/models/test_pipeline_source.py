"""A pipeline is asked with what its call passes to the check; what gives no images, and how many steps it takes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError
from qexp.models.pipeline_call import _as_images, check_arguments, number_of_steps
from qexp.tasks.recorder import Recorder


@dataclass
class Images:
    images: Any = None


@dataclass
class Audio:
    audios: Any = None


@dataclass
class Embeds:
    image_embeds: Any = None


@dataclass
class Video:
    frames: Any = None
    audio: Any = None


class Base:
    def check_inputs(self, prompt: Any, length: Any, height: Any = 8, tensors: Any = None) -> None:
        if length <= 0:  # a TypeError of None
            raise ValueError(f"length has to be positive but is {length}")
        if tensors not in (None, ["latents"]):
            raise ValueError(f"{tensors} are none of its tensors")


class FillsIn(Base):
    def __call__(self, prompt: Any = None, length: Any = None, callback_on_step_end: Any = None) -> Any:
        length = length or 7
        self.check_inputs(prompt, length)
        return Images(images=[])


class FillsInAfterwards(Base):
    def __call__(self, prompt: Any = None, length: Any = None, callback_on_step_end: Any = None) -> Any:
        self.check_inputs(prompt, length)
        length = length or 7
        return Images(images=[])


class PassesAnother(Base):
    def __call__(self, prompt: Any = None, seconds: Any = None, callback_on_step_end: Any = None) -> Any:
        self.check_inputs(prompt=prompt, length=0 if seconds is None else seconds * 24)
        return Images(images=[])


class PassesUnderAnotherName(Base):
    def __call__(self, prompt: Any = None, seconds: int = 3, callback_on_step_end: Any = None) -> Any:
        self.check_inputs(prompt=prompt, length=seconds, height=8)
        return Images(images=[])


class ChecksTensors(Base):
    def __call__(
        self,
        prompt: Any = None,
        length: int = 3,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("other",),
    ) -> Any:
        if callback_on_step_end is not None:
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(prompt, length, tensors=callback_on_step_end_tensor_inputs)
        return Images(images=[])


class GivesAudio:
    def __call__(self, prompt: Any = None, callback_on_step_end: Any = None) -> Any:
        return Audio(audios=[])


class GivesEmbeds:
    def __call__(self, prompt: Any = None, return_dict: bool = True, callback_on_step_end: Any = None) -> Any:
        if not return_dict:
            return ([],)
        return Embeds(image_embeds=[])


class GivesVideo:
    def __call__(self, prompt: Any = None, callback_on_step_end: Any = None) -> Any:
        return Video(frames=[], audio=[])


def task(**arguments: Any) -> GenerateConfig:
    return GenerateConfig(prompt=("a",), pipeline_arguments=arguments).resolved()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FillsIn, {}), (FillsIn, {"length": 3}), (PassesAnother, {}), (PassesAnother, {"seconds": 2}),
        (PassesUnderAnotherName, {}), (ChecksTensors, {}), (FillsInAfterwards, {"length": 3}), (GivesVideo, {}),
    ],
)  # fmt: skip
def test_task_that_the_pipeline_accepts_is_accepted(kind: type, arguments: dict[str, Any]) -> None:
    check_arguments(kind(), task(**arguments))


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (FillsIn, {"length": -3}, "FillsIn refuses it: length has to be positive but is -3"),
        (PassesUnderAnotherName, {"seconds": -1}, "length has to be positive but is -1"),
        (FillsInAfterwards, {}, "FillsInAfterwards refuses it: '<=' not supported"),
        (GivesAudio, {}, "GivesAudio gives audios, and task=generate compares images"),
        (GivesEmbeds, {}, "GivesEmbeds gives image_embeds"),
    ],
)
def test_task_that_the_pipeline_refuses_is_refused_before_it_is_called(
    kind: type, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_arguments(kind(), task(**arguments))


@pytest.mark.parametrize("output", [{"frames": [1]}, {"images": "mesh"}, {"audios": torch.ones(1)}])
def test_output_without_a_tensor_of_images_is_one_message(output: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="in place of a tensor of images"):
        _as_images(output)


class Stepping:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, prompt: Any = None, num_inference_steps: int = 4, callback_on_step_end: Any = None) -> Any:
        return Images(images=[])


class SteppingOfOld(Stepping):
    def __call__(self, prompt: Any = None, num_inference_steps: int = 4, callback: Any = None) -> Any:  # type: ignore[override]
        return Images(images=[])


@pytest.mark.parametrize(
    ("scheduler", "options", "each", "old"),
    [
        ("DDIMScheduler", {}, 8, 8),
        ("PNDMScheduler", {"skip_prk_steps": True}, 9, 8),  # the second step is taken twice
        ("HeunDiscreteScheduler", {}, 15, 8),  # two evaluations a step, one in the last
        ("KDPM2DiscreteScheduler", {}, 15, 8),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 8, 8),  # set_timesteps needs mu
    ],
)
def test_steps_are_those_that_the_scheduler_takes(scheduler: str, options: dict[str, Any], each: int, old: int) -> None:
    import diffusers

    made = getattr(diffusers, scheduler)(**options)
    before = str(made.timesteps)
    eight = GenerateConfig(prompt=("a", "b"), num_inference_steps=8).resolved()
    assert number_of_steps(Stepping(made), eight, 2) == 2 * each
    assert number_of_steps(SteppingOfOld(made), eight, 1) == old
    assert str(made.timesteps) == before  # it is a copy that was asked


def test_no_total_is_shown_once_it_is_passed(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder("generate", 4, torch.device("cpu"), lambda: (0.0, 0.0))
    recorder.begin()
    for step in range(1, 9):
        recorder.on_step(step, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("step ")[2].partition(",")[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4", "8"]
