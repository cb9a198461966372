"""Pipelines loaded by us: unquantized they are what diffusers loads, quantized what it loads quantized, bit for bit.

diffusers refuses bitsandbytes without a GPU though the library runs on CPUs; that gate is patched open here.
"""

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qexp
from qexp.checkpoints.checkpoint import open_component
from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError, LoadError
from qexp.models.diffusers import DiffusersConfig, Source
from qexp.models.pipeline_call import TRAJECTORY_VALUES, check_arguments, run_pipeline
from qexp.offloading.strategies import offload_of
from qexp.system import files
from tests.library_configs import LIBRARY_BACKENDS, library_config
from tests.pipelines import ARGUMENTS, PIPELINES, build_pipeline
from tests.products import exhaustive, representatives

BF16 = torch.bfloat16
PROMPTS = ("a red cube", "two trees")
Folder = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("open_gate")


def load_theirs(folder: Path, **options: Any) -> Any:
    import diffusers

    arguments = Source(DiffusersConfig(path=str(folder))).folder.arguments
    absent = {name: None for name, value in arguments.items() if value is None}
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=BF16, local_files_only=True, **absent, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)  # or a convolution in bf16 rounds otherwise, even under no_grad
    return pipeline


def call(pipeline: Any, name: str, seed: int = 3) -> Tensor:
    """Images of a call as a user makes it."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(PROMPTS))]
    arguments = dict(ARGUMENTS[name])
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    output = pipeline(prompt=list(PROMPTS), generator=generators, output_type="pt", **arguments)
    images: Tensor = output.images if hasattr(output, "images") else output.frames.flatten(0, 1)
    return 2 * images.float() - 1


@cache
def dense_images(folder: Path, name: str) -> Tensor:
    """Images of diffusers' unquantized pipeline."""
    return call(load_theirs(folder), name)


@cache
def quantized_images(folder: Path, name: str, backend: str) -> Tensor:
    """Images of our pipeline with a quantized denoiser."""
    return call(qexp.load_pipeline(folder, backend, device="cpu"), name)


@cache
def skeletons(folder: Path) -> dict[str, nn.Module]:
    """The components of a pipeline without weights: users look at their structure."""
    from accelerate import init_empty_weights

    source = Source(DiffusersConfig(path=str(folder)))
    with init_empty_weights(include_buffers=False):
        return {part: source.skeleton(part, dict(open_component(source, part).config)) for part in source.components()}


def task_of(name: str, **changes: Any) -> GenerateConfig:
    arguments = dict(ARGUMENTS[name])
    known = [key for key in arguments if hasattr(GenerateConfig, key)]
    values = {**{key: arguments.pop(key) for key in known}, "batch_size": 2, "prompt": PROMPTS, **changes}
    return GenerateConfig(pipeline_arguments=arguments, **values).resolved()


def run(pipeline: Any, name: str, seed: int = 3, **changes: Any) -> dict[str, Tensor]:
    task = task_of(name, **changes)
    return run_pipeline(pipeline, list(task.prompt), task, seed=seed, on_step=lambda step, state: None)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", representatives(PIPELINES, ["flux", "sdxl", "qwen_image"]))
def test_unquantized_it_is_what_diffusers_loads(name: str, pipeline_folder: Folder) -> None:
    theirs, ours = load_theirs(pipeline_folder(name)), qexp.load_pipeline(pipeline_folder(name), device="cpu")
    assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
    assert ours.components.keys() == theirs.components.keys()
    for component, model in theirs.components.items():
        if not isinstance(model, nn.Module):
            assert type(ours.components[component]) is type(model)
            continue
        expected, found = tensors_of(model), tensors_of(ours.components[component])
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if found[key].dtype != value.dtype] == []
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    outputs, expected_images = run(ours, name), call(theirs, name)
    assert torch.equal(outputs["images"], expected_images) and torch.equal(call(ours, name), expected_images)
    assert expected_images.std() > 0.05 and outputs["images"].shape[-3:] == (3, 32, 32)
    assert outputs["labels"].tolist() == [number for number in (0, 1) for _ in range(len(expected_images) // 2)]


def test_a_pipeline_that_is_saved_in_part_has_no_index(
    pipeline_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(DiffusersConfig(path=str(pipeline_folder("flux"))))
    write, written = files.write_bytes, list[Path]()

    def write_one(path: Path, content: bytes) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(files, "write_bytes", write_one)
        source.save_side_files(tmp_path)
    assert len(written) == 1 and not (tmp_path / "model_index.json").exists()
    source.save_side_files(tmp_path)
    assert (tmp_path / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("name", "backend"),
    [*product(["flux"], LIBRARY_BACKENDS), *(exhaustive("pixart", backend) for backend in LIBRARY_BACKENDS)],
)
def test_quantized_it_is_what_diffusers_loads_quantized(name: str, backend: str, pipeline_folder: Folder) -> None:
    kind: Any = type(build_pipeline(name).transformer)
    config, folder = library_config("diffusers", backend), pipeline_folder(name) / "transformer"
    transformer = kind.from_pretrained(folder, quantization_config=config, torch_dtype=BF16)
    expected = call(load_theirs(pipeline_folder(name), transformer=transformer), name)
    ours = qexp.load_pipeline(pipeline_folder(name), backend, device="cpu")
    assert ours.transformer.is_quantized and not getattr(ours.vae, "is_quantized", False)
    assert torch.equal(call(ours, name), expected)
    assert not torch.equal(expected, dense_images(pipeline_folder(name), name))


@pytest.mark.parametrize(
    ("name", "strategy"),
    representatives(
        product(("flux", "wan"), ("leaf", "block", "sequential", "model")),
        (("wan", "model"),),
    ),
)
def test_offloading_changes_no_bit(name: str, strategy: str, pipeline_folder: Folder) -> None:
    """The autoencoder is called by `decode`, and encoding prompts comes before it."""
    expected = quantized_images(pipeline_folder(name), name, "torchao")
    ours = qexp.load_pipeline(pipeline_folder(name), "torchao", device="cpu", offload=strategy)
    assert torch.equal(call(ours, name), expected)
    for model in (part for part in ours.components.values() if isinstance(part, nn.Module)):
        offload: Any = offload_of(model)
        statistics = offload.statistics()
        assert statistics["offload/copies"] > 0 and statistics["offload/transferred_gib"] > 0
        qexp.remove_offload(model)
    assert torch.equal(call(ours, name), expected)


def test_offloaded_as_a_whole_an_autoencoder_comes_for_encode_and_decode(pipeline_folder: Folder) -> None:
    vae = qexp.load(pipeline_folder("flux"), component="vae", device="cpu")
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
    latents = vae.encode(image).latent_dist.mean
    expected = vae.decode(latents)[0]
    offload = qexp.offload(vae, "model", device="cpu", to="disk")
    assert torch.equal(vae.encode(image).latent_dist.mean, latents) and torch.equal(vae.decode(latents)[0], expected)
    assert offload.statistics()["offload/copies"] == 1  # it stays until another one needs the place
    assert torch.equal(vae(image, sample_posterior=False)[0], expected)


def files_in(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "backend", representatives(["bitsandbytes", "torchao", "quanto", "gguf"], ("bitsandbytes", "gguf"))
)
def test_a_saved_pipeline_is_opened_again(backend: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    own = {"text_encoder_2": "quanto", "text_encoder": {"compute_dtype": "bf16"}}
    ours = qexp.load_pipeline(pipeline_folder("flux"), backend, components=own, device="cpu")
    expected = call(ours, "flux")
    files = qexp.save(ours, tmp_path / "saved")
    assert all(file.is_file() for file in files)
    sources, saved = files_in(pipeline_folder("flux")), files_in(tmp_path / "saved")
    assert saved == {file.relative_to(tmp_path / "saved") for file in files}
    weights = {Path("transformer/diffusion_pytorch_model.safetensors")} if backend == "gguf" else set()
    assert sources - weights <= saved
    again = qexp.load_pipeline(tmp_path / "saved", device="cpu")
    assert torch.equal(call(again, "flux"), expected)
    for component in ("transformer", "text_encoder_2"):
        config = json.loads((tmp_path / "saved" / component / "config.json").read_text())
        assert ("quantization_config" in config) == (backend != "gguf" or component != "transformer")
    if backend != "gguf":  # a pipeline of diffusers holds no .gguf file
        theirs = qexp.load_pipeline(pipeline_folder("flux"), backend, device="cpu")
        qexp.save(theirs, tmp_path / "dense_text")  # quanto in transformers' models is ours alone
        images = quantized_images(pipeline_folder("flux"), "flux", backend)
        difference = (call(load_theirs(tmp_path / "dense_text"), "flux") - images).abs().max()
        assert difference == 0 or (backend == "quanto" and difference < 0.05)  # whose layers they build anew


def test_weights_of_a_component_from_elsewhere(pipeline_folder: Folder, tmp_path: Path) -> None:
    folder = pipeline_folder("flux")
    quantized = qexp.load_pipeline(folder, "gguf", device="cpu")
    expected = call(quantized, "flux")
    qexp.save(quantized.transformer, tmp_path / "gguf")
    shutil.move(tmp_path / "gguf" / "model.gguf", tmp_path / "flux-Q8_0.gguf")  # alone, as hubs have them
    ours = qexp.load_pipeline(folder, checkpoints={"transformer": tmp_path / "flux-Q8_0.gguf"}, device="cpu")
    assert torch.equal(call(ours, "flux"), expected)
    assert ours.transformer.quantization_method == "gguf"
    qexp.save(ours, tmp_path / "again")  # with the config of the pipeline's own transformer
    assert torch.equal(call(qexp.load_pipeline(tmp_path / "again", device="cpu"), "flux"), expected)


def test_weights_from_elsewhere_are_of_the_config_beside_them(pipeline_folder: Folder, tmp_path: Path) -> None:
    """Three of them: another network of the class, quantized weights, and weights of another class."""
    import diffusers

    folder = pipeline_folder("flux")
    other = diffusers.AutoencoderKL.from_config(
        dict(diffusers.AutoencoderKL.load_config(folder / "vae")) | {"shift_factor": 0.3}
    )
    other.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert qexp.load_pipeline(folder, checkpoints={"vae": file}, device="cpu").vae.config.shift_factor == 0.3
    qexp.save(qexp.load(folder, "torchao", component="transformer", device="cpu"), tmp_path / "int8")
    file = tmp_path / "int8" / "diffusion_pytorch_model.safetensors"
    ours = qexp.load_pipeline(folder, None, checkpoints={"transformer": file}, device="cpu")
    assert torch.equal(call(ours, "flux"), quantized_images(folder, "flux", "torchao"))
    file = pipeline_folder("sd3") / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(LoadError, match=r"is a SD3Transformer2DModel, but the pipeline needs a FluxTransformer2DMod"):
        qexp.load_pipeline(folder, checkpoints={"transformer": file}, device="cpu")


def test_weights_from_elsewhere_that_do_not_belong_there(pipeline_folder: Folder, tmp_path: Path) -> None:
    flux, others = pipeline_folder("flux"), pipeline_folder("sd3") / "transformer"
    with pytest.raises(
        LoadError, match=r"checkpoints\.transformer=.* is a SD3Transformer2DModel, but the pipeline needs"
    ):
        qexp.load_pipeline(flux, checkpoints={"transformer": others}, device="cpu")
    with pytest.raises(ConfigError, match=r"model\.checkpoints\.vae=.*/nothing does not exist; give a folder"):
        qexp.load_pipeline(flux, checkpoints={"vae": tmp_path / "nothing"}, device="cpu")


@pytest.mark.parametrize(
    ("name", "component"),
    representatives(
        product(PIPELINES, ("denoiser", "text_encoder", "vae")),
        (("sdxl", "vae"),),
    ),
)
def test_components_in_several_dtypes(name: str, component: str, pipeline_folder: Folder) -> None:
    """One in fp32 among those in bf16: what one gives, the next takes in its own dtype."""
    folder, backend = pipeline_folder(name), None
    if component == "denoiser":  # which is what is quantized
        component, backend = "unet" if name == "sdxl" else "transformer", "torchao"
    mixed = {component: {"compute_dtype": "fp32"}}
    ours = qexp.load_pipeline(folder, backend, device="cpu", components=mixed)
    models = {part: model for part, model in ours.components.items() if isinstance(model, nn.Module)}
    assert {part for part, model in models.items() if model.dtype == torch.float32} == {component}
    images = call(ours, name)
    same = quantized_images(folder, name, backend) if backend else dense_images(folder, name)
    assert not torch.equal(images.float(), same.float())
    assert (images.float() - same.float()).abs().mean() < 0.02
    offloaded = qexp.load_pipeline(folder, backend, device="cpu", components=mixed, offload="model")
    assert torch.equal(call(offloaded, name), images)


@pytest.mark.parametrize("component", representatives(["transformer", "text_encoder_2", "vae"], ["vae"]))
def test_a_pipeline_in_several_dtypes_is_opened_again(component: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    mixed = {component: {"compute_dtype": "fp32"}}
    ours = qexp.load_pipeline(pipeline_folder("flux"), None, device="cpu", components=mixed)
    qexp.save(ours, tmp_path / "saved")
    assert torch.equal(call(qexp.load_pipeline(tmp_path / "saved", device="cpu"), "flux"), call(ours, "flux"))


def test_an_autoencoder_that_its_pipeline_casts_is_met_in_that_dtype(pipeline_folder: Folder) -> None:
    """SDXL's overflows in fp16: the pipeline decodes in fp32."""
    mixed = {"text_encoder": {"compute_dtype": "fp32"}}
    ours = qexp.load_pipeline(pipeline_folder("sdxl"), None, device="cpu", compute_dtype="fp16", components=mixed)
    assert torch.isfinite(call(ours, "sdxl").float()).all()


def test_a_copy_of_an_autoencoder_answers_for_itself(pipeline_folder: Folder) -> None:
    mixed = {"vae": {"compute_dtype": "fp32"}}
    vae = qexp.load_pipeline(pipeline_folder("flux"), None, device="cpu", components=mixed).vae
    latents = torch.randn(1, vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0)).to(BF16)
    expected, twin = vae.decode(latents)[0], copy.deepcopy(vae)
    assert expected.dtype == torch.float32
    for parameter in vae.parameters():
        parameter.zero_()
    assert torch.equal(twin.decode(latents)[0], expected)
    assert not torch.equal(vae.decode(latents)[0], expected)


def test_a_pipeline_stored_in_several_dtypes_is_what_diffusers_loads(pipeline_folder: Folder, tmp_path: Path) -> None:
    """Wan's autoencoder is published in fp32; the pipeline casts what it gets."""
    theirs = load_theirs(pipeline_folder("wan"))
    theirs.vae.to(torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = qexp.load_pipeline(tmp_path, device="cpu")
    assert ours.vae.dtype == torch.float32 and ours.transformer.dtype == BF16
    assert torch.equal(call(ours, "wan"), call(theirs, "wan"))


def test_a_pipeline_is_never_saved_over_its_source(pipeline_folder: Folder, tmp_path: Path) -> None:
    """Not in part either, where the weights of its first component are from elsewhere."""
    folder, elsewhere = copy_of(pipeline_folder("flux"), tmp_path / "pipeline"), tmp_path / "elsewhere"
    first = Source(DiffusersConfig(path=str(folder))).components()[0]
    shutil.copytree(folder / first, elsewhere)
    ours = qexp.load_pipeline(folder, "torchao", quantize=[first], checkpoints={first: elsewhere}, device="cpu")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(
        ConfigError, match=r"save: '.*' contains the checkpoint that the model is loaded from.*another folder"
    ):
        qexp.save(ours, folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_the_same_noise_in_every_dtype_and_batch(pipeline_folder: Folder) -> None:
    """Of the first step: what comes before the network has touched it is the noise of each image's generator."""
    noise: dict[str, Tensor] = {}
    for name, dtype in (("bf16", BF16), ("fp32", torch.float32)):
        ours = qexp.load_pipeline(pipeline_folder("flux"), device="cpu", compute_dtype=dtype)
        generators = [torch.Generator().manual_seed(3 + number) for number in range(2)]
        noise[name], _ = ours.prepare_latents(2, 4, 32, 32, dtype, "cpu", generators)
    assert noise["bf16"].dtype == BF16 and torch.equal(noise["bf16"], noise["fp32"].to(BF16))
    one, both = run(ours, "flux", batch_size=1), run(ours, "flux", batch_size=2)
    assert (one["latents"] - both["latents"]).abs().max() < 1e-4
    copies = run(ours, "flux", prompt="a red cube", num_images_per_prompt=2)
    assert copies["labels"].tolist() == [0, 0]
    assert (copies["images"][0] - one["images"][0]).abs().max() < 1e-4  # seed + 0, whatever stands beside it
    assert not torch.equal(copies["images"][0], copies["images"][1])


def test_steps_are_reported_with_a_sample_of_latents(pipeline_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRAJECTORY_VALUES == 65536
    monkeypatch.setattr("qexp.models.pipeline_call.TRAJECTORY_VALUES", 100)
    for name in ("flux", "pixart"):  # with a callback of today, and of old
        ours, seen = qexp.load_pipeline(pipeline_folder(name), device="cpu"), list[tuple[int, Any]]()
        task = task_of(name, prompt=["a", "b", "c"])

        def on_step(step: int, state: Any, seen: Any = seen) -> None:
            seen.append((step, state))

        outputs = run_pipeline(ours, ["a", "b", "c"], task, seed=0, on_step=on_step)
        assert [step for step, _ in seen] == [1, 2, 3, 4]  # two batches of two steps
        last = outputs["latents"][:2].flatten()
        assert torch.equal(seen[1][1], last[:: -(-len(last) // 100)])
        assert {state.shape for _, state in seen} == {seen[0][1].shape}  # the second batch is smaller, and padded
        assert len(outputs["images"]) == len(outputs["latents"]) == 3


@pytest.mark.parametrize("name", representatives(["qwen_image", "flux"], ["qwen_image"]))
def test_images_of_a_batch_of_prompts_are_those_of_each_alone(name: str, pipeline_folder: Folder) -> None:
    """Several images of prompts of unequal length, and of negative prompts where it has them."""
    ours = qexp.load_pipeline(pipeline_folder(name), device="cpu", compute_dtype="fp32")
    prompts = ("a", "two trees by a lake")
    changes: dict[str, Any] = {"num_images_per_prompt": 2, "prompt": prompts, "max_sequence_length": 512}
    changes |= {"negative_prompt": ("blur, and more of it", "b")} if name == "qwen_image" else {}
    together, alone = (run(ours, name, batch_size=size, **changes) for size in (2, 1))
    assert together["labels"].tolist() == alone["labels"].tolist() == [0, 0, 1, 1]
    assert (together["images"] - alone["images"]).abs().max() < 1e-3
    assert (together["images"][0] - together["images"][2]).abs().max() > 0.05


REFUSED_TASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": (
        "flux", {"pipeline_arguments": {"guidence_scale": 1}},
        r"pipeline_arguments\.guidence_scale is no argument of FluxPipeline \(did you mean guidance_scale",
    ),
    "not its own": ("flux", {"num_frames": 5}, r"task\.num_frames is no argument of FluxPipeline; it takes .*height"),
    "given by us": ("flux", {"pipeline_arguments": {"output_type": "pil"}}, "given by this program itself"),
    "a field": ("flux", {"pipeline_arguments": {"height": 32}}, r"set task\.height instead"),
    "multiple of 4": ("flux", {"height": 30}, r"task\.height=30 must be a multiple of 4 for FluxPipeline; use 28 or 3"),
    "its own rule": ("wan", {"height": 24}, r"WanPipeline refuses it: `height` and `width` have to be divisible by 16"),
    "frames": ("wan", {"num_frames": 6}, r"num_frames=6 must be one more than a multiple of 2 .*; use 5 or 7"),
    "negative": ("sd3", {"negative_prompt": ["a", "b", "c"]}, r"has 3 texts for the 2 of task\.prompt"),
    "too long": ("flux", {"max_sequence_length": 1000}, "refuses it: `max_sequence_length` cannot be greater than 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TASKS)
def test_a_task_that_a_pipeline_cannot_do(case: str, pipeline_folder: Folder) -> None:
    name, changes, message = REFUSED_TASKS[case]
    own = {"pipeline_arguments": {}} | changes
    source = Source(DiffusersConfig(path=str(pipeline_folder(name))))
    pipeline = source.pipeline(dict(skeletons(pipeline_folder(name))))
    arguments = {key: value for key, value in ARGUMENTS[name].items() if hasattr(GenerateConfig, key)}
    task = GenerateConfig(**{**arguments, "prompt": PROMPTS, **own}).resolved()
    with pytest.raises(ConfigError, match=message):
        check_arguments(pipeline, task)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("DiTPipeline", "DiTPipeline needs 'class_labels', and task=generate gives it prompts and numbers alone; use"),
        ("ConsistencyModelPipeline", "ConsistencyModelPipeline takes no prompt, and"),
        ("WanImageToVideoPipeline", "WanImageToVideoPipeline needs 'image', and"),
        ("PaintByExamplePipeline", "needs 'example_image', 'image', 'mask_image', and"),
        ("LongCatImagePipeline", r"LongCatImagePipeline tells nobody about its steps \(it has no callback_on_step_end"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused_before_its_weights_are_read(kind: str, message: str) -> None:
    import diffusers

    pipeline = object.__new__(getattr(diffusers, kind))  # its call is all that is looked at
    with pytest.raises(ConfigError, match=message):
        check_arguments(pipeline, GenerateConfig(prompt=PROMPTS).resolved())


def copy_of(folder: Path, target: Path, **index: Any) -> Path:
    """A pipeline's folder with links in place of its weights, and another index."""

    def copy(source: str, place: str) -> None:
        if source.endswith(".safetensors"):
            Path(place).symlink_to(source)
        else:
            shutil.copy(source, place)

    shutil.copytree(folder, target, copy_function=copy)
    names = json.loads((target / "model_index.json").read_text()) | index
    (target / "model_index.json").write_text(json.dumps({key: value for key, value in names.items() if value != "-"}))
    return target


INDICES: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"_class_name": "Flux9Pipeline"}, r"is of a Flux9Pipeline, which diffusers \d.* has not \(the pipeline "
    "was saved by diffusers .*install"),
    "code": ({"_class_name": ["pipeline", "MyPipeline"]}, "pipelines with their own code are not supported"),
    "component class": ({"vae": ["diffusers", "AutoencoderXL"]}, r"'vae' is AutoencoderXL of diffusers, which "
    r"diffusers \d.* has not"),
    "library": ({"vae": ["flaxers", "AutoencoderKL"]}, "AutoencoderKL of flaxers, a library whose models are not "
    "loaded"),
    "more": ({"refiner": ["diffusers", "AutoencoderKL"]}, r"names the component 'refiner' \(AutoencoderKL of "
    r"diffusers\), but .*does not exist"),
    "argument": ({"is_turbo": True}, r"has 'is_turbo', which the FluxPipeline of diffusers \d.* does not take"),
    "less": ({"vae": "-"}, r"cannot open its .* as FluxPipeline"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_fit(case: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    changes, message = INDICES[case]
    folder = copy_of(pipeline_folder("flux"), tmp_path / "pipeline", **changes)
    with pytest.raises(LoadError, match=message):
        qexp.load_pipeline(folder, device="cpu")


def test_a_folder_that_lacks_a_file(pipeline_folder: Folder, tmp_path: Path) -> None:
    folder = copy_of(pipeline_folder("flux"), tmp_path / "pipeline")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match=r"cannot open its scheduler, tokenizer, tokenizer_2 as FluxPipeline"):
        qexp.load_pipeline(folder, device="cpu")
    (folder / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(LoadError, match=r"'text_encoder_2' \(T5EncoderModel of transformers\), but .* holds no config"):
        qexp.load_pipeline(folder, device="cpu")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(LoadError, match=r"'text_encoder_2' .*text_encoder_2' does not exist; download the pipeline"):
        qexp.load_pipeline(folder, device="cpu")


def test_what_is_no_pipeline(pipeline_folder: Folder, tmp_path: Path) -> None:
    folder = pipeline_folder("flux")
    for path, message in {
        folder / "transformer": r"the config\.json of FluxTransformer2DModel: it is a component \(in a pipeline, set "
        r"\+model\.checkpoints\.transformer=.*; alone, qexp\.load\(\) loads it\)",
        folder / "text_encoder": "the config.json of CLIPTextModel, a model of transformers: use model=causal_lm",
        folder.parent: f"but its subfolder .*{folder.name}",
        folder / "model_index.json": "is a file",
        tmp_path / "nothing": "does not exist; give the folder of a pipeline",
    }.items():
        with pytest.raises((ConfigError, LoadError), match=message):
            qexp.load_pipeline(path, device="cpu")


def test_one_component_alone(pipeline_folder: Folder) -> None:
    model = qexp.load(pipeline_folder("sdxl"), "torchao", component="unet", device="cpu")
    assert type(model).__name__ == "UNet2DConditionModel" and model.quantization_method == "torchao"
    message = r"component=None is none of this source's: use text_encoder, text_encoder_2.*, or qexp\.load_pipeline"
    with pytest.raises(ConfigError, match=message):
        qexp.load(pipeline_folder("sdxl"), device="cpu")


def test_variants_and_old_names(pipeline_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of a variant are taken where they are; attention layers of old files are renamed."""
    from safetensors.torch import load_file, save_file

    folder = copy_of(pipeline_folder("sdxl"), tmp_path / "pipeline")
    expected = dense_images(pipeline_folder("sdxl"), "sdxl")
    name = "diffusion_pytorch_model"
    (folder / "unet" / f"{name}.safetensors").rename(folder / "unet" / f"{name}.fp16.safetensors")
    tensors = load_file(folder / "vae" / f"{name}.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, before in ((f"attentions.0.{now}.", f"attentions.0.{before}.") for now, before in old.items()):
        tensors = {key.replace(now, before): value for key, value in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    (folder / "vae" / f"{name}.safetensors").unlink()
    save_file(tensors, folder / "vae" / f"{name}.safetensors", {"format": "pt"})
    assert torch.equal(call(qexp.load_pipeline(folder, device="cpu", variant="fp16"), "sdxl"), expected)
    said = [line for line in capsys.readouterr().err.splitlines() if "model.variant=fp16" in line]
    assert [line.split(":")[1].strip() for line in said] == ["text_encoder", "text_encoder_2", "vae"]
    with pytest.raises(LoadError, match=r"variant=fp8: no component .* has files of this variant"):
        qexp.load_pipeline(folder, device="cpu", variant="fp8")
