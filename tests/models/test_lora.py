"""LoRA on pipelines: on unquantized ones diffusers' answer, bit for bit; on quantized ones exact beside the base."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError, LoadError
from qexp.experiments.reference import reference_config
from qexp.experiments.resolve import to_run_config
from qexp.experiments.run import run_experiment
from qexp.loading.lifecycle import load_component
from qexp.models.diffusers import DiffusersConfig, Source
from qexp.models.lora import LoraConfig, lora_configs, read_updates
from qexp.models.lora_scales import in_pattern
from qexp.sweep.run_key import reference_key, run_key
from tests.assigning import assigned
from tests.backends import CPU, EVERY_WAY_TO_QUANTIZE, backend_config
from tests.fresh_process import run_python
from tests.models.test_diffusers import call as call_theirs
from tests.models.test_diffusers import dense_images, load_theirs, skeletons, task_of
from tests.pipelines import load_components
from tests.products import exhaustive, representatives

Folder = Callable[[str], Path]
LAYERS = {
    "flux": ["to_q", "to_out.0", "proj_mlp", "ff.net.2", "x_embedder"],
    "sd3": ["to_q", "add_k_proj", "ff.net.0.proj"],
    "sdxl": ["to_q", "ff.net.2", "conv1", "conv_shortcut", "proj_in"],
    "qwen_image": ["to_q", "img_mlp.net.2"],
    "wan": ["to_q", "ffn.net.2"],
}


def denoiser_of(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def save_lora(pipeline_folder: Folder, name: str, folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A LoRA as diffusers' training scripts save it, with random weights that change the image."""
    folder.mkdir(exist_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(lora_file(pipeline_folder(name), name, seed, json.dumps(config)))
    return path


@cache  # peft takes as long to wrap a network as a test takes with it
def lora_file(model_folder: Path, name: str, seed: int, config: str) -> bytes:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipeline = load_theirs(model_folder)
    component = denoiser_of(pipeline)
    model = getattr(pipeline, component)
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": LAYERS[name], "init_lora_weights": False}
    options: dict[str, Any] = {**defaults, **json.loads(config)}
    model.add_adapter(PeftConfig(**options))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter) * 0.2
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(model)}
    metadata = _collate_lora_metadata({component: model})
    with TemporaryDirectory() as folder:
        type(pipeline).save_lora_weights(folder, **layers, **metadata)
        return (Path(folder) / "pytorch_lora_weights.safetensors").read_bytes()


def images_of_ours(folder: Path, name: str, lora: Any) -> torch.Tensor:
    source, models = load_components(folder, lora=lora)
    task = task_of(name)
    source.check_run(models, task)
    for component, model in models.items():
        source.adapt(component, model, torch.bfloat16)
    outputs = source.generate(models, task, seed=3, device=CPU, on_step=lambda step, state: None)
    images: torch.Tensor = outputs["images"]
    return images


def images_of_theirs(folder: Path, name: str, loras: dict[Path, float]) -> torch.Tensor:
    pipeline = load_theirs(folder)
    for number, path in enumerate(loras):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"number{number}")
    pipeline.set_adapters([f"number{number}" for number in range(len(loras))], list(loras.values()))
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return call_theirs(pipeline, name)


@pytest.mark.parametrize("name", representatives(LAYERS, ["flux", "sdxl"]))
def test_unquantized_it_is_what_diffusers_computes(name: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    folder, path = pipeline_folder(name), save_lora(pipeline_folder, name, tmp_path)
    ours = images_of_ours(folder, name, {"path": str(path), "weight": 0.5})
    assert torch.equal(ours, images_of_theirs(folder, name, {path: 0.5}))
    assert not torch.equal(ours, dense_images(folder, name))


def test_several_are_added_in_their_order(pipeline_folder: Folder, tmp_path: Path) -> None:
    paths = [save_lora(pipeline_folder, "flux", tmp_path / str(seed), seed=seed, r=3 + seed) for seed in range(2)]
    folder = pipeline_folder("flux")
    ours = images_of_ours(folder, "flux", [str(paths[0].parent), {"path": str(paths[1]), "weight": -0.3}])
    assert torch.equal(ours, images_of_theirs(folder, "flux", {paths[0]: 1.0, paths[1]: -0.3}))


@pytest.mark.parametrize("use_rslora", [exhaustive(False), True])
def test_ranks_and_alphas_of_single_layers(pipeline_folder: Folder, tmp_path: Path, use_rslora: bool) -> None:
    patterns = {"rank_pattern": {"proj_mlp": 2}, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 11}}
    path = save_lora(pipeline_folder, "flux", tmp_path, use_rslora=use_rslora, **patterns)
    folder = pipeline_folder("flux")
    ours = images_of_ours(folder, "flux", str(path))
    assert torch.equal(ours, images_of_theirs(folder, "flux", {path: 1.0}))


@pytest.mark.parametrize(
    ("layer", "alpha"),
    [("to_q", 8), ("attn.to_q", 8), ("blocks.0.add_to_q", 1), ("to_q_proj", 1), ("attn.to_q.0", 1), ("ff.net.2", 4)],
)
def test_patterns_begin_at_the_border_of_a_segment(layer: str, alpha: float) -> None:
    assert in_pattern(layer, {"to_q": 8, r"net\.\d": 4}, 1) == alpha


def kohya(path: Path, target: Path, alphas: tuple[float, ...]) -> Path:
    """The same updates as kohya's scripts name them, with these alphas in turn."""
    tensors = {}
    for number, (name, tensor) in enumerate(load_file(path).items()):
        layer, _, part = name.removeprefix("transformer.").removeprefix("unet.").rpartition(".lora_")
        prefix = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{prefix}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        tensors[f"{prefix}.alpha"] = torch.tensor(alphas[number // 2 % len(alphas)])
    save_file(tensors, target)
    return target


def test_a_file_of_kohya(pipeline_folder: Folder, tmp_path: Path) -> None:
    path = save_lora(pipeline_folder, "sdxl", tmp_path, target_modules=["to_q", "to_v"])
    path = kohya(path, tmp_path / "k.safetensors", (3.0,))
    ours = images_of_ours(pipeline_folder("sdxl"), "sdxl", str(path))
    assert torch.equal(ours, images_of_theirs(pipeline_folder("sdxl"), "sdxl", {path: 1.0}))
    assert not torch.equal(ours, dense_images(pipeline_folder("sdxl"), "sdxl"))


def scales_of(pipeline_folder: Folder, name: str, lora: Any) -> dict[str, float]:
    """component.layer -> the factor of its update."""
    source = Source(DiffusersConfig(path=str(pipeline_folder(name)), lora=lora))
    source.check_run(dict(skeletons(pipeline_folder(name))), task_of(name))
    return {
        f"{component}.{layer}": update.scale
        for component, layers in source._updates.items()
        for layer, (update,) in layers.items()
    }


def test_alphas_of_single_layers_of_kohya_are_each_layers_own(pipeline_folder: Folder, tmp_path: Path) -> None:
    """diffusers gives all layers the most common one, because its alphas have other names than its layers."""
    path = save_lora(pipeline_folder, "sdxl", tmp_path, target_modules=["to_q", "ff.net.2"])
    expected, alphas = {}, (1.0, 5.0, 8.0)
    for number, name in enumerate(load_file(path)):
        expected[name.rpartition(".lora_")[0]] = alphas[number // 2 % 3] / 4
    path = kohya(path, tmp_path / "k.safetensors", alphas)
    assert scales_of(pipeline_folder, "sdxl", str(path)) == expected


def test_a_layer_without_an_alpha_beside_others_with_one_has_its_rank(pipeline_folder: Folder, tmp_path: Path) -> None:
    path = save_lora(pipeline_folder, "sdxl", tmp_path, target_modules=["to_q"])
    stored = load_file(kohya(path, tmp_path / "k.safetensors", (8.0,)))
    bare = next(name for name in stored if name.endswith(".alpha"))
    del stored[bare]
    save_file(stored, tmp_path / "k.safetensors")
    scales = scales_of(pipeline_folder, "sdxl", str(tmp_path / "k.safetensors"))
    assert sorted(scales.values()) == [1.0, *[2.0] * (len(scales) - 1)]


def peft_folder(pipeline_folder: Folder, name: str, folder: Path, **options: Any) -> Path:
    """A LoRA on a denoiser as peft itself saves it: the alpha is in adapter_config.json alone."""
    folder.mkdir(exist_ok=True)
    for file, content in peft_files(pipeline_folder(name), name, json.dumps(options)).items():
        (folder / file).write_bytes(content)
    return folder


@cache
def peft_files(model_folder: Path, name: str, options: str) -> dict[str, bytes]:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.manual_seed(0)
    pipeline = load_theirs(model_folder)
    defaults = {"r": 4, "lora_alpha": 32, "target_modules": LAYERS[name], "init_lora_weights": False}
    values: dict[str, Any] = {**defaults, **json.loads(options)}
    wrapped = get_peft_model(getattr(pipeline, denoiser_of(pipeline)), PeftConfig(**values))
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter) * 0.1
    with TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "one scale": ("sdxl", {}),
    "rsLoRA": ("flux", {"use_rslora": True}),
    "ranks of single layers": ("flux", {"rank_pattern": {"proj_mlp": 2}, "target_modules": ["to_q", "proj_mlp"]}),
    "alphas of single layers": ("sdxl", {"alpha_pattern": {"attn2.to_q": 8}, "target_modules": ["to_q", "ff.net.2"]}),
    "biases": ("flux", {"lora_bias": True}),
}


@pytest.mark.parametrize("case", representatives(PEFT, ["rsLoRA", "alphas of single layers", "biases"]))
def test_peft_folder_is_what_peft_computes(case: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    from peft import PeftModel

    name, options = PEFT[case]
    path = peft_folder(pipeline_folder, name, tmp_path, **options)
    pipeline = load_theirs(pipeline_folder(name))
    component = denoiser_of(pipeline)
    wrapped = PeftModel.from_pretrained(getattr(pipeline, component), path, autocast_adapter_dtype=False)
    wrapped.requires_grad_(False)
    setattr(pipeline, component, wrapped.get_base_model())
    expected = call_theirs(pipeline, name)
    ours = images_of_ours(pipeline_folder(name), name, str(path))
    # where scales differ they are multiplied into B before it is rounded to bf16
    assert (ours - expected).abs().max() <= (0.03 if "single" in case else 0)
    assert (expected - dense_images(pipeline_folder(name), name)).abs().max() > 0.05


PEFT_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "LOHA"}, r"adapter_config\.json': peft_type=LOHA is no LoRA"),
    "base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changes the weights"),
    "biases": ({"bias": "all"}, "bias=all trains biases of the model"),
    "modules": ({"modules_to_save": ["proj_out"]}, r"modules_to_save=\['proj_out'\] is not applied here"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.* is not applied here"),
    "unknown": ({"use_qalora": True}, "use_qalora=True is not applied here; use a plain LoRA"),
    "rank": ({"r": 8}, r"says that the rank of '\S+' is 8, but in '.*adapter_model.safetensors' it is 4"),
    "alpha": ({"lora_alpha": None}, "has lora_alpha=None, which is no number"),
}


@pytest.mark.parametrize("case", PEFT_REFUSED)
def test_adapter_config_that_says_more_than_is_applied_is_refused(
    case: str, pipeline_folder: Folder, tmp_path: Path
) -> None:
    changes, message = PEFT_REFUSED[case]
    path = peft_folder(pipeline_folder, "flux", tmp_path, target_modules=["to_q"])
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LoadError, match=message):
        scales_of(pipeline_folder, "flux", str(path))


def test_adapter_config_beside_a_file_with_alphas_of_its_own_is_refused(
    pipeline_folder: Folder, tmp_path: Path
) -> None:
    path = kohya(save_lora(pipeline_folder, "sdxl", tmp_path), tmp_path / "k.safetensors", (2.0,))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    for file in (path, tmp_path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(LoadError, match="has alphas of its own; put the file into a folder without"):
            scales_of(pipeline_folder, "sdxl", str(file))
    shutil.copy(path, tmp_path / "adapter_model.safetensors")
    assert set(scales_of(pipeline_folder, "sdxl", str(path)).values()) == {0.5}  # it is of the other one


def test_adapter_config_is_part_of_the_key(pipeline_folder: Folder, tmp_path: Path) -> None:
    path = peft_folder(pipeline_folder, "flux", tmp_path, target_modules=["to_q"])
    model, before = pipeline_folder("flux"), run_key(config_of(pipeline_folder("flux"), f"model.lora={path}"))
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert run_key(config_of(model, f"model.lora={path}")) != before


def test_lora_for_one_of_two_transformers_is_applied_to_it(pipeline_folder: Folder, tmp_path: Path) -> None:
    path = save_lora(pipeline_folder, "wan", tmp_path)
    layers = [name.removeprefix("transformer.").rpartition(".lora_")[0] for name in load_file(path)]
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    authors = {f"diffusion_model.{name}": tensor for name, tensor in wan_of_the_authors().items()}
    save_file(authors, tmp_path / "authors.safetensors")
    for entry, component in (
        ({"path": str(path)}, "transformer"),  # its names say so
        ({"path": str(path), "component": "transformer_2"}, "transformer_2"),
        ({"path": str(tmp_path / "bare.safetensors"), "component": "transformer_2"}, "transformer_2"),
    ):
        assert {*scales_of(pipeline_folder, "wan", entry)} == {f"{component}.{layer}" for layer in layers}
    entry = {"path": str(tmp_path / "authors.safetensors"), "component": "transformer_2"}
    assert {*scales_of(pipeline_folder, "wan", entry)} == {"transformer_2.blocks.0.attn1.to_q"}
    for name in ("bare", "authors"):
        with pytest.raises(
            ConfigError, match=r"does not say which of transformer or transformer_2 it is for; name it.*component: tr"
        ):
            scales_of(pipeline_folder, "wan", str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(ConfigError, match=r"component=transformr_2 .*did you mean transformer_2"):
        scales_of(pipeline_folder, "wan", {"path": str(path), "component": "transformr_2"})
    with pytest.raises(ConfigError, match=r"model.lora: component=unet is not a component of this pipeline"):
        config_of(pipeline_folder("wan"), f"model.lora={{path: {path}, component: unet}}")


def wan_of_the_authors() -> dict[str, torch.Tensor]:
    return {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 64),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(64, 4),
    }


def test_text_encoders_have_their_own(pipeline_folder: Folder, tmp_path: Path) -> None:
    rows = {}
    for component in ("text_encoder", "text_encoder_2"):
        for layer in ("q_proj", "v_proj"):
            name = f"{component}.text_model.encoder.layers.1.self_attn.{layer}"
            rows |= {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4)}
    save_file(rows, tmp_path / "text.safetensors")
    folder = pipeline_folder("sdxl")
    ours = images_of_ours(folder, "sdxl", str(tmp_path / "text.safetensors"))
    assert torch.equal(ours, images_of_theirs(folder, "sdxl", {tmp_path / "text.safetensors": 1.0}))
    assert not torch.equal(ours, dense_images(folder, "sdxl"))


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_on_a_quantized_layer_the_update_is_exact(backend: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    path = save_lora(pipeline_folder, "flux", tmp_path)
    narrow = ("group_size=16",) if backend.startswith("packed") else ()  # the first layer has 16 inputs
    source = Source(DiffusersConfig(path=str(pipeline_folder("flux")), lora=str(path)))
    transformer: Any = load_component(
        source, "transformer", ComponentConfig(backend_config(backend, *narrow)), device=CPU, loader=LoaderConfig()
    ).model
    source.check_run({**skeletons(pipeline_folder("flux")), "transformer": transformer}, task_of("flux"))
    layer, x = transformer.transformer_blocks[1].attn.to_q, torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        base = layer(x)
        source.adapt("transformer", transformer, torch.bfloat16)
        answer = layer(x)
    stored = load_file(path)
    a, b = (stored[f"transformer.transformer_blocks.1.attn.to_q.lora_{part}.weight"].bfloat16() for part in "AB")
    assert torch.equal(answer, base + x @ a.T @ b.T * 1.5)  # alpha 6 / rank 4
    assert not torch.equal(answer, base)


def run(folder: Path, model: Path, *overrides: str) -> torch.Tensor:
    folder.mkdir()
    config = config_of(model, *overrides)
    run_experiment(config, folder)
    return load_file(folder / "outputs.safetensors")["images"]


def config_of(model: Path, *overrides: str) -> Any:
    small = "height=32", "width=32", "num_inference_steps=2", "max_sequence_length=16", "prompt=[a red cube,two trees]"
    fields = [f"task.{entry}" for entry in small]
    return to_run_config(assigned("model=diffusers", f"model.path={model}", "device=cpu", *fields, *overrides))


@pytest.mark.parametrize("offload", representatives(["leaf", "block", "model"], ["block"]))
def test_what_is_offloaded_gives_the_same_images(offload: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    model, path = pipeline_folder("flux"), save_lora(pipeline_folder, "flux", tmp_path / "lora")
    resident = run(tmp_path / "resident", model, f"model.lora={path}")
    travelling = run(tmp_path / "travelling", model, f"model.lora={path}", f"offload={offload}", "offload.to=disk")
    assert torch.equal(resident, travelling)
    assert not torch.equal(resident, run(tmp_path / "without", model))


def test_it_is_part_of_the_key_by_content_and_of_the_reference(pipeline_folder: Folder, tmp_path: Path) -> None:
    model, path = pipeline_folder("flux"), save_lora(pipeline_folder, "flux", tmp_path / "one")
    other = save_lora(pipeline_folder, "flux", tmp_path / "two", seed=1)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(path.read_bytes())
    plain, with_lora = config_of(model), config_of(model, f"model.lora={path}")
    for key in (run_key, reference_key):
        assert key(with_lora) == key(config_of(model, f"model.lora=[{{path: {moved}, weight: 1}}]"))
        keys = {key(plain), key(with_lora), key(config_of(model, f"model.lora={other}"))}
        assert len(keys | {key(config_of(model, f"model.lora=[{{path: {path}, weight: 0.5}}]"))}) == 4
    assert reference_config(with_lora).model.lora == str(path)


@pytest.mark.exhaustive
def test_it_needs_no_peft(pipeline_folder: Folder, tmp_path: Path) -> None:
    path = save_lora(pipeline_folder, "flux", tmp_path)
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from tests.models.test_diffusers import task_of\n"
        "from tests.pipelines import load_components\n"
        "source, models = load_components(sys.argv[1], lora=sys.argv[2])\n"
        "source.check_run(models, task_of('flux'))\n"
        "print(len(source._updates['transformer']))"
    )
    assert int(run_python(code, pipeline_folder("flux"), path)) == len(load_file(path)) / 2


def of_another_size(flux: Path) -> dict[str, torch.Tensor]:
    name = "transformer.proj_out"
    return {f"{name}.lora_A.weight": torch.ones(4, 3072), f"{name}.lora_B.weight": torch.ones(64, 4)}


def of_layers_that_are_not_there(flux: Path) -> dict[str, torch.Tensor]:
    return {name.replace("blocks.1.", "blocks.30."): tensor for name, tensor in load_file(flux).items()}


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Path], dict[str, torch.Tensor]] | None, str]] = {
    "another architecture": ("sdxl", {}, None, r"does not fit FluxPipeline: it has 'unet\.\S+.* none "
    "of its components .*use a"),
    "another size": ("flux", {}, of_another_size, r"'proj_out' maps 64 values to 16, but the LoRA's A is "
    r"\[4, 3072\] and B \[64, 4\]"),
    "layers": ("flux", {}, of_layers_that_are_not_there, r"transformer has no layer '\S+blocks\.30\.\S+'.* "
    r"of the \d+ .*another size of it"),
    "a DoRA": ("flux", {"use_dora": True}, None, "is a DoRA, whose weight norms a quantized layer has "
    "not; use a LoRA"),
    "no LoRA": ("flux", {}, lambda _: {"model.layers.0.weight": torch.ones(2)}, "does not fit FluxPipeline|"
    "cannot convert it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_does_not_fit_is_refused(case: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    name, config, change, message = REFUSED[case]
    path = save_lora(pipeline_folder, name, tmp_path, **config)
    if change is not None:
        save_file(change(path), path)
    with pytest.raises(LoadError, match=message):
        scales_of(pipeline_folder, "flux", str(path))


def test_pipeline_without_lora_and_file_that_cannot_be_read(pipeline_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PixArtSigmaPipeline has no LoRA in diffusers"):
        scales_of(pipeline_folder, "pixart", str(save_lora(pipeline_folder, "flux", tmp_path)))
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(LoadError, match=r"broken\.safetensors cannot be read: .*; get it again"):
        scales_of(pipeline_folder, "flux", str(tmp_path / "broken.safetensors"))


def test_a_path_that_is_not_there_is_refused_while_composing(pipeline_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora=/no/such must be a \.safetensors file.*; it does not exist"):
        config_of(pipeline_folder("flux"), "model.lora=/no/such")
    with pytest.raises(ConfigError, match=r"folder with one; it has none"):
        config_of(pipeline_folder("flux"), f"model.lora={tmp_path}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "model.lora=3 must be a path, or a list of them; with weights: "),
        ({"weight": 1}, "must be a path"),
        ({"path": "a", "wieght": 1}, "model.lora.wieght .*did you mean weight"),
        ({"path": "a", "component": 3}, "component=3 of 'a' must be a component's name"),
        ({"path": "a", "weight": "x"}, "weight=x of 'a' must be a finite number"),
        ({"path": "a", "weight": float("nan")}, "weight=nan of 'a' must be a finite number"),
        ("", "must be a path"),
    ],
)
def test_a_setting_that_is_none(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_configs(value)


def test_settings_of_every_form() -> None:
    import diffusers

    one, two = LoraConfig("a"), LoraConfig("b", 0.5)
    assert lora_configs(None) == ()
    assert lora_configs("a") == (one,)
    assert lora_configs(["a", {"path": "b", "weight": 0.5}]) == (one, two)
    assert read_updates((), diffusers.FluxPipeline, {}) == {}
