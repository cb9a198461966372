"""task=sensitivity from settings to files: planted outliers come first, and both scores agree."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qexp
from qexp.errors import ConfigError
from qexp.experiments.run import check_experiment, run_experiment
from qexp.loading.lifecycle import plan_component, request_load
from qexp.models.base import load_source
from qexp.models.digits import ASSETS
from qexp.results.run_folder import PARTIAL
from qexp.sensitivity.groups import plan_groups
from qexp.sensitivity.heat_map import PNG
from qexp.sensitivity.table import Candidate, SensitivityTable, read_table
from tests.assigning import run_config
from tests.backends import CPU
from tests.language import save_language_model
from tests.products import representatives
from tests.sensitivity.test_scores import decoded

PLANTED = "blocks.2.attn.to_v"
DIGITS = ("task.samples=2", "task.states=2", "task.num_inference_steps=3", "skip_modules=[blocks.0,blocks.3,t_embed]")


def run(folder: Path, *overrides: str) -> SensitivityTable:
    run_experiment(run_config("task=sensitivity", *overrides), folder)
    return read_table(folder)


def ranked(table: SensitivityTable) -> list[str]:
    quantized = [candidate for candidate in table.candidates if candidate.format != "none"]
    return [one.group for one in sorted(quantized, key=lambda one: one.score, reverse=True)]


def rank_correlation(one: SensitivityTable, other: SensitivityTable) -> float:
    from scipy.stats import spearmanr

    def key(candidate: Candidate) -> tuple[str, str, str]:
        return candidate.component, candidate.group, candidate.format

    scores = {key(candidate): candidate.score for candidate in other.candidates}
    assert scores.keys() == {key(candidate) for candidate in one.candidates}
    pairs = [(own.score, scores[key(own)]) for own in one.candidates if own.format != "none"]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


@pytest.fixture
def without_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an empty figure: most tests look at the table alone."""
    monkeypatch.setattr("qexp.experiments.sensitivity.draw_heat_map", lambda table, folder: (folder / PNG).touch())


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """The embedded model with an outlier in every block of 32 weights of one layer."""
    folder = tmp_path / "planted"
    folder.mkdir()
    tensors = load_file(ASSETS / "diffusion_pytorch_model.safetensors")
    tensors[f"{PLANTED}.weight"][:, ::32] *= 40
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(ASSETS / "config.json", folder)
    return folder


@pytest.mark.parametrize("score", representatives(["exact", "final", "gradient"], ["exact"]))
def test_a_layer_with_planted_outliers_is_ranked_first(score: str, planted: Path, tmp_path: Path) -> None:
    overrides = (f"model.path={planted}", f"task.score={score}", "task.formats=[gguf_q4_0]", *DIGITS)
    table = run(tmp_path / "run", *overrides)
    assert ranked(table)[0] == PLANTED
    assert (table.header.score, table.header.error, table.header.samples) == (score, "squared_error", 2)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "plan.json", "sensitivity.csv", "sensitivity.json", "sensitivity.png",
    }  # fmt: skip
    assert not (tmp_path / "run" / PARTIAL).exists()


@pytest.mark.usefixtures("without_figure")
def test_final_scores_are_errors_of_the_samples_over_their_typical_error(tmp_path: Path) -> None:
    overrides = ("compute_dtype=fp32", "task.samples=3", "task.num_inference_steps=2", "skip_modules=[blocks,t_embed]")
    options = ("task.formats=[gguf_q4_0,gguf]", "seed=5")
    table = run(tmp_path / "run", "task.score=final", *overrides, *options)
    layers = [name for _, name in table.groups()]
    model = qexp.load("digits", "none", device="cpu", compute_dtype="float32").eval()

    @torch.no_grad()
    def samples() -> Tensor:
        state = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        for time in (1.0, 0.5):
            state = state - model(state, torch.full((3,), time), torch.arange(3)) / 2
        return state.double().flatten(1)

    def errors(names: list[str], kind: str) -> Tensor:
        parameters = [model.get_submodule(name).weight for name in names]
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data = decoded(parameter.detach(), kind)
        found = (samples() - expected).square().mean(1)
        for parameter, weight in zip(parameters, before, strict=True):
            parameter.data = weight
        return found

    expected = samples()
    typical = (errors(layers, "Q4_0") * errors(layers, "Q8_0")).sqrt()
    for candidate in table.candidates:
        if candidate.format != "none":
            own = errors([candidate.group], candidate.format.removeprefix("gguf "))
            score = float((own / typical).mean() * typical.log().mean().exp())
            assert candidate.score == pytest.approx(score, rel=1e-2)


@pytest.mark.exhaustive
def test_both_scores_rank_a_language_model_alike(tmp_path: Path) -> None:
    overrides = ("model=arithmetic", "task.samples=6", "task.formats=[gguf_q4_0,packed_uint3]")
    tables = [run(tmp_path / score, *overrides, f"task.score={score}") for score in ("exact", "gradient")]
    assert rank_correlation(*tables) > 0.85  # 24 squares for each score
    assert {table.header.error for table in tables} == {"kl"}


@pytest.mark.exhaustive
def test_both_scores_rank_the_digits_model_alike(tmp_path: Path) -> None:
    tables = [run(tmp_path / score, f"task.score={score}") for score in ("exact", "gradient")]
    assert rank_correlation(*tables) > 0.97


def test_bytes_of_one_format_everywhere_are_those_of_its_plan() -> None:
    config = run_config("task=sensitivity", "task.formats=[gguf_q4_0]")
    source, uniform = load_source(config.model), run_config("backend=gguf_q4_0").components["transformer"]
    dense, quantized = (
        request_load(source, "transformer", settings, device=CPU)
        for settings in (config.components["transformer"], uniform)
    )
    groups, plan = plan_groups(dense, config.task), plan_component(quantized).prepared.plan
    total = sum(item.result_nbytes for item in plan.distinct)
    assert groups.fixed_bytes + sum(group.nbytes["gguf Q4_0"] for group in groups.groups) == total


@pytest.mark.usefixtures("without_figure")
def test_a_weight_that_an_embedding_has_too_saves_nothing(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "tied", tie_word_embeddings=True)
    overrides = ("model=causal_lm", f"model.path={folder}", "model.skip_modules=[]", "task.formats=[gguf_q4_0]")
    text = tmp_path / "text.txt"
    text.write_text("543+870=3240\n" * 9, encoding="utf-8")
    config = run_config("task=sensitivity", f"task.text={text}", *overrides)
    source, settings = load_source(config.model), config.components["model"]
    groups = plan_groups(request_load(source, "model", settings, device=CPU), config.task)
    head = next(group for group in groups.groups if group.name == "lm_head")
    assert head.nbytes == {"none": 0, "gguf Q4_0": 32 * 64 // 32 * 18}
    table = run(tmp_path / "run", f"task.text={text}", *overrides)
    assert next(one for one in table.candidates if one.group == "lm_head" and one.score > 0)
    assert table.header.fixed_bytes == {"model": groups.fixed_bytes}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["backend=gguf"], "loads the unquantized model"),
        (["task.formats=[ggu]"], r"task\.formats\[0\]=ggu is no format \(did you mean gguf\?\)"),
        (["task.formats=[]"], r"task\.formats=\[\] must be a list of formats"),
        (["task.formats=[torchao_int8dq]"], "quantizes activations, too"),
        (["task.formats=[bitsandbytes_int8]"], "quantizes activations, too"),
        (["task.formats=[{backend: gguf, modules_to_not_convert: [a]}]"], "is for a whole model"),
        (["task.groups=[[a,b*]]"], "is a pattern among names of siblings"),
        (["task.score=best"], "task.score='best' is unknown; use exact, final or gradient"),
        (["task.samples=0"], "task.samples=0 must be 1 or more"),
        (["task.window=8"], "is of windows of a text"),
        (["offload=leaf"], "offload"),
        (["offload=block"], "use offload=none, or offload=block with task.score=gradient"),
        (["task.base=gguf", "task.score=gradient"], "is not for task.score=gradient"),
        (["model=arithmetic", "task.score=final"], "is of samples that are generated by steps"),
        (["task.base=gguf", "task.formats=[gguf_q4_0]"], "must be one of task.formats: gguf Q4_0"),
        (["model=arithmetic", "task.prompt=[a]"], "which reads a text"),
        (["model=arithmetic", "task.window=999"], "positions of this model"),
        (["model=causal_lm", f"model.path={ASSETS.parent / 'arithmetic'}"], "task.text=null names no text to read"),
    ],
)
def test_settings_that_cannot_be_scored_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config("task=sensitivity", *overrides)


def test_groups_that_match_nothing_are_found_before_weights_are_read(tmp_path: Path) -> None:
    config = run_config("task=sensitivity", "task.groups=[[to_q,to_x]]")
    with pytest.raises(ConfigError, match=r"task\.groups\[0\] of 'transformer': .*matches no layer with a format"):
        check_experiment(config, tmp_path)


@pytest.mark.exhaustive
def test_scores_do_not_depend_on_the_compute_dtype_of_activations(tmp_path: Path) -> None:
    """The checkpoint is in bf16: weights in fp32 are the same numbers, and so are those that are made of them."""
    overrides = ("model=arithmetic", "task.samples=2", "task.formats=[gguf_q4_0]")
    tables = [run(tmp_path / dtype, *overrides, f"compute_dtype={dtype}") for dtype in ("bf16", "fp32")]
    scores = [torch.tensor([one.score for one in table.candidates]) for table in tables]
    assert torch.allclose(scores[0], scores[1], rtol=1e-3)
    assert json.loads((tmp_path / "bf16" / "sensitivity.json").read_text())["unit"] == "nats of a predicted token"


@pytest.mark.usefixtures("without_figure")
def test_gradient_scores_of_blocks_on_disk_are_those_of_a_model_in_memory(tmp_path: Path) -> None:
    overrides = ("model=arithmetic", "task.samples=2", "task.formats=[gguf_q4_0]", "task.score=gradient")
    tables = [run(tmp_path / name, *overrides, *more) for name, more in (
        ("memory", ()), ("disk", ("offload=block", "offload.to=disk")),
    )]  # fmt: skip
    assert [(one.group, one.nbytes) for one in tables[0].candidates] == [
        (one.group, one.nbytes) for one in tables[1].candidates
    ]
    scores = [torch.tensor([one.score for one in table.candidates]) for table in tables]
    assert torch.allclose(scores[0], scores[1], rtol=1e-4, atol=0) and bool((scores[0] > 0).any())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["flux", "sdxl", "wan"])
def test_both_scores_rank_the_layers_of_a_pipeline_alike(name: str, tmp_path: Path) -> None:
    from tests.pipelines import save_pipeline

    folder = save_pipeline(name, tmp_path / "pipeline")
    overrides = ["model=diffusers", f"model.path={folder}", "task.prompt=[a cat,a dog]", "task.formats=[gguf_q4_0]"]
    overrides += ["task.num_inference_steps=3", "task.states=2", "task.height=32", "task.width=32"]
    overrides += ["task.num_frames=5"] if name == "wan" else []
    tables = [run(tmp_path / score, *overrides, f"task.score={score}") for score in ("exact", "gradient")]
    assert rank_correlation(*tables) > 0.9
