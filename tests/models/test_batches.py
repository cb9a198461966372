"""One sample's answer is the same alone and in any batch: masks, noise and what a pipeline replaces."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qexp
from qexp.config.generate import GenerateConfig
from qexp.models.pipeline_call import BATCHED, BATCHED_BY_PROMPT, number_of_steps, run_pipeline
from tests.models.test_diffusers import run, task_of
from tests.pipelines import ARGUMENTS, MORE_PIPELINES, PIPELINES, build_pipeline
from tests.products import representatives

Folder = Callable[[str], Path]
LONG, SHORT = "two tall trees by a lake, far away", "a"


@pytest.fixture(scope="module")
def opened(pipeline_folder: Folder) -> Callable[[str], Any]:
    """Load a pipeline in fp32 once; each call returns another one of the same networks, to have parts replaced."""
    loaded = cache(lambda name: qexp.load_pipeline(pipeline_folder(name), device="cpu", compute_dtype="fp32"))
    return lambda name: copy.copy(loaded(name))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def check_together_and_alone(pipeline: Any, name: str, **changes: Any) -> dict[str, Tensor]:
    """Two prompts, two images each: in one batch, one prompt a call, and each prompt in a run of its own."""
    changes = {"num_images_per_prompt": 2, "prompt": (LONG, SHORT), **changes}
    torch.manual_seed(1)
    together = run(pipeline, name, batch_size=2, **changes)
    torch.manual_seed(2)  # the global generator does not count
    alone = run(pipeline, name, batch_size=1, **changes)
    of_second = {key: value[1:] for key, value in changes.items() if key in ("prompt", "negative_prompt")}
    second = run(pipeline, name, seed=3 + 2, batch_size=1, **changes | of_second)
    for key in ("images", "latents"):
        assert difference(together[key], alone[key]) < 1e-3
        assert torch.equal(alone[key][len(alone[key]) // 2 :], second[key])
    assert together["labels"].tolist() == alone["labels"].tolist()
    assert all(difference(alone["latents"][0], other) > 0.05 for other in alone["latents"][1:])
    return alone


@pytest.mark.parametrize("name", representatives([*PIPELINES, *MORE_PIPELINES], ["flux", "sana", "ltx"]))
def test_batch_of_prompts_is_each_prompt_alone(name: str, opened: Callable[[str], Any]) -> None:
    changes = {"negative_prompt": ("blur, and more of it", "b")} if name in ("qwen_image", "sana", "sd") else {}
    check_together_and_alone(opened(name), name, **changes)


@pytest.mark.exhaustive
def test_every_batched_pipeline_is_one_of_those_above() -> None:
    assert {*BATCHED, *BATCHED_BY_PROMPT} <= {
        type(build_pipeline(name)).__name__ for name in [*PIPELINES, *MORE_PIPELINES]
    }


SCHEDULERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # pipeline, scheduler, its configuration
    "flow match, stochastic": ("flux", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow match LCM": ("flux", "FlowMatchLCMScheduler", {}),
    "LCM": ("sd", "LCMScheduler", {}),
    "ancestral": ("sd", "EulerAncestralDiscreteScheduler", {}),
    "ancestral of second order": ("sd", "KDPM2AncestralDiscreteScheduler", {}),
    "DDPM": ("sd", "DDPMScheduler", {}),
    "SDE": ("sd", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "SDE of one step": ("sd", "DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "SA": ("sd", "SASolverScheduler", {}),
    "TCD": ("sd", "TCDScheduler", {}),
    "stochastic video": ("wan", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}


@pytest.mark.parametrize("case", representatives(SCHEDULERS, ["flow match, stochastic", "LCM", "SDE"]))
def test_noise_of_a_scheduler_is_of_the_sample(case: str, opened: Callable[[str], Any]) -> None:
    import diffusers

    name, scheduler, config = SCHEDULERS[case]
    pipeline = opened(name)
    plain = run(pipeline, name, batch_size=1, prompt=(LONG,))
    kind: Any = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config(dict(pipeline.scheduler.config), **config)
    noisy = check_together_and_alone(pipeline, name, num_inference_steps=3)
    assert difference(plain["latents"][0], noisy["latents"][0]) > 0.05


def test_scheduler_that_takes_generators_gives_what_diffusers_computes(opened: Callable[[str], Any]) -> None:
    import diffusers

    pipeline = opened("sd")
    pipeline.scheduler = diffusers.LCMScheduler.from_config(dict(pipeline.scheduler.config))
    ours = run(pipeline, "sd", batch_size=1, prompt=(SHORT,), num_images_per_prompt=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipeline(SHORT, generator=generators, num_images_per_prompt=2, output_type="pt", **ARGUMENTS["sd"])
    assert torch.equal(ours["images"], 2 * theirs.images - 1)


class Unlisted:
    """A pipeline that draws as `draw` says, and whose samples depend on the longest of its prompts."""

    def __init__(self, draw: Callable[[int], Tensor]) -> None:
        self.draw, self.calls = draw, list[tuple[list[str], int]]()

    def __call__(
        self, prompt: Any = None, num_images_per_prompt: int = 1, num_inference_steps: int = 1, generator: Any = None,
        output_type: str = "pt", callback: Any = None, callback_steps: int = 1,
    ) -> Any:  # fmt: skip
        from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

        self.calls.append((prompt, num_images_per_prompt))
        count = len(prompt) * num_images_per_prompt
        noise = self.draw(count).expand(count, 3, 4, 4) * max(map(len, prompt))
        for step in range(num_inference_steps):
            callback(step, 0, noise)
        return StableDiffusionPipelineOutput(images=noise, nsfw_content_detected=[len(prompt[0]) == 1] * count)


DRAWS: dict[str, tuple[Callable[[int], Tensor], bool]] = {  # what is drawn, and whether for all samples together
    "of the samples": (lambda count: torch.randn(count, 3, 4, 4), False),
    "like the samples": (lambda count: torch.rand_like(torch.zeros(count, 3, 4, 4)), False),
    "one field": (lambda count: torch.randn(4, 4), True),
    "one number": (lambda count: torch.randint(0, 1 << 30, []) / 1.0, True),
    "an order": (lambda count: torch.randperm(16).reshape(4, 4) / 1.0, True),
}


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("case", DRAWS)
def test_unlisted_pipeline_makes_one_image_a_call(case: str, is_listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is listed does so where it draws for all samples of a call together."""
    draw, is_mixed = DRAWS[case]
    if is_listed:
        monkeypatch.setattr("qexp.models.pipeline_call.BATCHED_BY_PROMPT", ("Unlisted",))
    task = GenerateConfig(prompt=("ab", "c"), num_images_per_prompt=2, batch_size=4, num_inference_steps=1).resolved()

    def outputs(prompts: list[str], copies: int, seed: int) -> tuple[dict[str, Tensor], Unlisted]:
        pipeline, own = Unlisted(draw), GenerateConfig(prompt=tuple(prompts), num_images_per_prompt=copies).resolved()
        return run_pipeline(pipeline, prompts, own, seed=seed, on_step=lambda step, state: None), pipeline

    found, pipeline = outputs(["ab", "c"], 2, 5)
    alone = [(["ab"], 1), (["ab"], 1), (["c"], 1), (["c"], 1)]
    if is_listed:  # those that are repeated are in vain
        both = [(["ab"], 2), (["c"], 2)]
        alone = [both[0], *alone[:2], both[1], *alone[2:]] if is_mixed else both
    assert pipeline.calls == alone
    each = [outputs([prompt], 1, 5 + number)[0] for number, prompt in enumerate(("ab", "ab", "c", "c"))]
    for key in ("images", "latents", "nsfw_content_detected"):
        assert torch.equal(found[key], torch.cat([one[key] for one in each]))
    assert found["nsfw_content_detected"].tolist() == [False, False, True, True]
    assert number_of_steps(pipeline, task, 2) == (2 if is_listed else 4)


def test_safety_checker_of_a_pipeline_is_heard(opened: Callable[[str], Any]) -> None:
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    pipeline = opened("sd")
    assert set(run(pipeline, "sd")) == {"images", "latents", "labels"}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    vision = {**sizes, "image_size": 30, "patch_size": 15, "projection_dim": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=16)
    pipeline.safety_checker = StableDiffusionSafetyChecker(config).eval()
    pipeline.feature_extractor = transformers.CLIPImageProcessor(
        crop_size={"height": 30, "width": 30}, size={"shortest_edge": 30}
    )
    for threshold, flagged in ((10.0, [False, False]), (-10.0, [True, True])):
        pipeline.safety_checker.concept_embeds_weights.fill_(threshold)
        outputs = run(pipeline, "sd")
        assert outputs["nsfw_content_detected"].tolist() == flagged
        assert [bool((image == -1).all()) for image in outputs["images"]] == flagged  # black


def test_steps_are_counted_by_calls() -> None:
    task = task_of("flux", prompt=["a", "b", "c"], batch_size=2)
    assert number_of_steps(build_pipeline("flux"), task, 3) == 4
    assert number_of_steps(Unlisted(lambda count: torch.zeros(count)), task, 3) == 6
