"""Every file that a source reads is part of a run's key: what it says it reads is compared with what is opened."""

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qexp.experiments.run import run_experiment
from qexp.models.base import load_source
from qexp.sweep.run_key import reference_key, run_key
from tests.assigning import run_config
from tests.language import TEXT as TEXT_OF_CHARACTERS
from tests.language import save_language_model
from tests.pipelines import save_pipeline
from tests.products import exhaustive, representatives

TEXT = ("task=generate", "task.prompt=['1+1=']", "task.max_new_tokens=2", "backend=none")
IMAGE = ("task.prompt=[a cat]", "task.height=32", "task.width=32", "task.num_inference_steps=1", "backend=none")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that Python opens during a test. An audit hook would slow all later tests of the process: it stays."""
    paths: list[str] = []

    def note_paths(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noting(file: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(file, str | bytes | os.PathLike):
                paths.append(os.fsdecode(file))
            return original(file, *arguments, **options)

        monkeypatch.setattr(owner, name, noting)

    for owner in (builtins, io, os):
        note_paths(owner, "open")
    return paths


def language(folder: Path) -> tuple[str, ...]:
    save_language_model(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return ("model=causal_lm", f"model.path={folder}", *TEXT)


def arithmetic(folder: Path) -> tuple[str, ...]:
    """Its own text would take seconds; the prompts are read from the same file."""
    text = folder.with_name("text.txt")
    text.write_text(TEXT_OF_CHARACTERS)
    return ("model=arithmetic", "model.problems=1", "task.max_new_tokens=2", f"task.text={text}", "backend=none")


def pipeline(folder: Path) -> tuple[str, ...]:
    save_pipeline("sdxl", folder)
    return ("model=diffusers", f"model.path={folder}", *IMAGE)


def digits(folder: Path) -> tuple[str, ...]:
    return ("model=digits", "task.num_images=1", "task.num_inference_steps=1", "backend=none")


@pytest.mark.parametrize("model", [language, arithmetic, pipeline, digits])
def test_files_that_a_source_opens_are_those_it_declares(
    model: Callable[[Path], tuple[str, ...]], opened: list[str], tmp_path: Path
) -> None:
    overrides = model(tmp_path / "model")
    config = run_config(*overrides)
    source = load_source(config.model)
    declared = {file.resolve() for file in source.side_files()}
    for checkpoint in source.checkpoints().values():
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        weights = [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]
        declared |= {file.resolve() for file in [folder / "config.json", *weights]}
    opened.clear()
    (tmp_path / "run").mkdir()
    run_experiment(config, tmp_path / "run")
    source.scores(load_file(tmp_path / "run" / "outputs.safetensors"))
    places = [tmp_path / "model", *(path.parent.resolve() for path in declared)]
    read = {
        Path(name).resolve() for name in opened if any(str(Path(name).resolve()).startswith(f"{p}/") for p in places)
    }
    read = {path for path in read if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert read, "nothing was read"
    assert read <= declared, read - declared


def append(file: Path, entry: str, value: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {entry: value}))


CHANGES: dict[str, tuple[Callable[[Path], tuple[str, ...]], Callable[[Path], Any]]] = {
    "generation settings": (language, lambda folder: append(folder / "generation_config.json", "max_new_tokens", 3)),
    "tokenizer settings": (language, lambda folder: append(folder / "tokenizer_config.json", "add_bos_token", True)),
    "vocabulary": (language, lambda folder: append(folder / "tokenizer.json", "truncation", None)),
    "chat template": (language, lambda folder: (folder / "chat_template.jinja").write_text("other")),
    "a file that is new": (language, lambda folder: (folder / "processor_config.json").write_text("{}")),
    "scheduler": (pipeline, lambda f: append(f / "scheduler" / "scheduler_config.json", "steps_offset", 1)),
    "text encoder's tokenizer": (pipeline, lambda f: append(f / "tokenizer" / "tokenizer_config.json", "x", 1)),
    "class of the pipeline": (pipeline, lambda f: append(f / "model_index.json", "_diffusers_version", "0.1")),
}


@pytest.mark.parametrize("name", representatives(CHANGES, ["vocabulary", "a file that is new", "scheduler"]))
def test_key_of_changed_side_file_is_another(name: str, tmp_path: Path) -> None:
    model, change = CHANGES[name]
    config = run_config(*model(tmp_path / "model"))
    before = run_key(config), reference_key(config)
    change(tmp_path / "model")
    after = run_key(config), reference_key(config)
    assert after[0] != before[0] and after[1] != before[1]


@pytest.mark.parametrize("model", [exhaustive(language), pipeline])
def test_key_of_copied_folder_is_the_same(model: Callable[[Path], tuple[str, ...]], tmp_path: Path) -> None:
    overrides = model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    copied = [override.replace(str(tmp_path / "model"), str(tmp_path / "copy")) for override in overrides]
    assert run_key(run_config(*overrides)) == run_key(run_config(*copied))
