"""What is imported before workers are forked: all that experiments import."""

import json
from pathlib import Path

import pytest

import qexp
from qexp.sweep.preload import KERNELS, import_modules, modules_of
from tests.assigning import run_config
from tests.fresh_process import run_python

BACKENDS = ("quanto", "torchao", "bitsandbytes", "gguf_q4_0", "packed_uint4")
CODE = """
import json, sys
from pathlib import Path
from tests.assigning import run_config
from qexp.experiments.reference import reference_config
from qexp.results.run_folder import RunFolder
from qexp.sweep.preload import import_modules, modules_of
from qexp.sweep.reference import prepare_folder
from qexp.sweep.worker import Work, do_work

config = run_config(*sys.argv[2:], "tracking=none", f"paths.outputs={sys.argv[1]}", "device=cpu")
import_modules(modules_of(config))
before = set(sys.modules)
folders = []
for name, each in (("reference", reference_config(config)), ("run", config)):
    folders.append(RunFolder(Path(sys.argv[1], name)))
    folders[-1].path.mkdir(parents=True)
    prepare_folder(folders[-1], each, ())
    reference = folders[0].path if name == "run" else None
    status = do_work(Work(folders[-1].path, "all" if reference else "run", reference))
    assert status.status == "done", status
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def late_imports(folder: Path, *overrides: str) -> list[str]:
    """The modules of libraries that an experiment imports after the preload."""
    printed = run_python(CODE, folder / "outputs", *overrides)
    return [name for name in json.loads(printed.splitlines()[-1]) if not name.startswith("qexp.")]


@pytest.mark.exhaustive  # some ten seconds each
@pytest.mark.parametrize("backend", BACKENDS)
def test_experiment_on_images_imports_no_library_after_the_preload(backend: str, tmp_path: Path) -> None:
    assert late_imports(tmp_path, f"backend={backend}", "task.num_images=2", "task.num_inference_steps=2") == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "words",
    [
        ("model=arithmetic", "task=perplexity"),
        ("model=arithmetic", "model.problems=2", "task=generate"),
        ("task=roundtrip",),
        ("model=arithmetic", "task=roundtrip", "backend=gguf"),
    ],
    ids=lambda words: "-".join(words).replace("=", "_"),
)
def test_experiment_of_another_task_imports_no_library_after_the_preload(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    assert late_imports(tmp_path, "backend=quanto", *words) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_pipeline_imports_no_library_after_the_preload(name: str, tmp_path: Path) -> None:
    from tests.pipelines import save_pipeline

    save_pipeline(name, tmp_path / name)
    model = ("model=diffusers", f"model.path={tmp_path / name}", "task.height=32", "task.width=32", "task.prompt=a")
    assert late_imports(tmp_path, *model, "task.num_inference_steps=2", "backend=quanto") == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["generate", "perplexity"])
def test_language_model_imports_no_library_after_the_preload(task: str, tmp_path: Path) -> None:
    from tests.language import save_language_model

    text = tmp_path / "text.txt"
    text.write_text("543+870=3240\n" * 9, encoding="utf-8")
    words = (f"task.text={text}",) if task == "perplexity" else ("task.prompt=one", "task.max_new_tokens=2")
    model = ("model=causal_lm", f"model.path={save_language_model(tmp_path / 'model')}")
    assert late_imports(tmp_path, *model, f"task={task}", *words, "backend=quanto") == []


def test_compiled_loops_are_read_for_what_calls_them(tmp_path: Path) -> None:
    assert KERNELS in modules_of(run_config("backend=torchao"))
    folder = tmp_path / "stored"
    qexp.save(qexp.load("arithmetic", "torchao", device="cpu"), folder)
    stored = run_config("model=arithmetic", f"model.path={folder}", "backend=torchao", "task=perplexity")
    assert KERNELS not in modules_of(stored)


def test_functions_are_called_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    called: list[str] = []
    monkeypatch.setattr(platform, "node", lambda: called.append("node"))
    import_modules(["platform", "platform:node"])
    assert called == ["node"]
    import_modules(["platform::node", "platform::NoSuchClass"])
    assert called == ["node"]
    with pytest.raises(ModuleNotFoundError):
        import_modules(["no_such_module:node"])
