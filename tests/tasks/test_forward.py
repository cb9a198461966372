"""task=forward: what is called with what, what is kept, and what is said of inputs that do not fit."""

import csv
import importlib
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.experiments.reference import reference_config
from qexp.experiments.run import run_experiment
from qexp.scoring.score import score
from qexp.sweep.run_key import run_key
from qexp.tasks.forward import call_network, run_forward, tensors_of
from qexp.tasks.forward_inputs import in_dtype, read_inputs
from qexp.tasks.input_files import ForwardConfig, check_file
from tests.assigning import run_config
from tests.backends import CPU
from tests.models.test_networks import BF16, save_network
from tests.products import exhaustive
from tests.tasks.contexts import context_of

CODE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 8)
    def forward(self, x, rows=None, scale=None):
        for block in self.blocks:
            x = x + block(x).relu()
        x = x if scale is None else x * scale
        return {"hidden": x if rows is None else x + rows[:, None], "logits": [self.head(x), x.argmax(-1)]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory: mynet.py, its weights, and 10 rows of inputs."""
    (tmp_path / "mynet.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    mynet = importlib.import_module("mynet")

    torch.manual_seed(0)
    save_file(mynet.Net().state_dict(), "weights.safetensors")
    inputs = {"x": torch.randn(10, 64), "rows": torch.arange(10), "scale": torch.tensor(2.0)}
    save_file(inputs, "inputs.safetensors")
    np.save("x.npy", inputs["x"].double().numpy())
    yield tmp_path
    sys.modules.pop("mynet", None)


def config(*overrides: str) -> Any:
    model = ("model=python", "model.factory=mynet:Net", "model.checkpoint=weights.safetensors", "device=cpu")
    return run_config(*model, "task=forward", *overrides)


def experiment(folder: Path, name: str, *overrides: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (folder / name).mkdir()
    metrics = run_experiment(config(*overrides), folder / name)
    return metrics, load_file(folder / name / "outputs.safetensors")


@pytest.mark.parametrize("batch_size", [exhaustive(1), 4, 10])
def test_outputs_are_the_networks_own_batch_by_batch(batch_size: int, folder: Path) -> None:
    network = importlib.import_module("mynet").Net()
    network.load_state_dict(load_file("weights.safetensors"))
    given = load_file("inputs.safetensors")
    with torch.no_grad():
        expected = network(**given)
    arguments = ("task.inputs=inputs.safetensors", f"task.batch_size={batch_size}", "backend=none")
    metrics, outputs = experiment(folder, "run", *arguments)
    assert outputs.keys() == {"hidden", "logits.0"}
    assert torch.allclose(outputs["hidden"], expected["hidden"], atol=1e-5)
    assert torch.allclose(outputs["logits.0"], expected["logits"][0], atol=1e-5)
    rows = list(csv.DictReader((folder / "run" / "memory.csv").open()))
    assert [row["step"] for row in rows] == [str(n + 1) for n in range(-(-10 // batch_size))]
    assert metrics["time/measured_steps"] == len(rows) - 1
    if batch_size == 10:  # the only step is the first one: there is nothing to take a median of
        assert metrics["time/step_ms"] is None and metrics["time/first_step_ms"] > 0
    else:
        assert 0 < metrics["time/step_ms"] <= 1000 * metrics["time/total_seconds"]


def test_numbers_against_the_reference_are_numpys(folder: Path) -> None:
    chosen = ("task.inputs=x.npy", "backend=bitsandbytes", "compute_dtype=bf16")
    _, ours = experiment(folder, "ours", *chosen)
    reference = reference_config(config(*chosen))
    (folder / "reference").mkdir()
    run_experiment(reference, folder / "reference")
    theirs = load_file(folder / "reference" / "outputs.safetensors")
    assert ours["hidden"].dtype == BF16 and theirs["hidden"].dtype == torch.float32  # each in its own dtype
    numbers = score(config(*chosen), folder / "ours", folder / "reference")
    a, b = (np.concatenate([side[name].double().numpy().ravel() for name in sorted(side)]) for side in (theirs, ours))
    assert numbers["quality/relative_l2"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert numbers["quality/cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert numbers["quality/exact"] == 0 and numbers["quality/finite"] == 1
    rows = {row["output"]: row for row in csv.DictReader((folder / "ours" / "outputs.csv").open())}
    assert rows.keys() == {"hidden", "logits.0"} and rows["hidden"]["shape"] == "10x64"
    difference = np.abs(theirs["hidden"].double().numpy() - ours["hidden"].double().numpy())
    assert float(rows["hidden"]["max_abs_error"]) == pytest.approx(difference.max())
    same = score(config("task.inputs=x.npy", "backend=none"), folder / "reference", folder / "reference")
    assert (same["quality/exact"], same["quality/relative_l2"]) == (1, 0)


def test_offloading_and_device_maps_change_no_bit(folder: Path) -> None:
    chosen = ("task.inputs=inputs.safetensors", "backend=torchao")
    _, expected = experiment(folder, "resident", *chosen)
    for name, more in {
        "leaf": ("offload=leaf", "offload.to=disk"),
        "block": ("offload=block", "offload.to=cpu"),
        "map": ("device_map={*:cpu,head:disk}",),
    }.items():
        _, outputs = experiment(folder, name, *chosen, *more)
        assert all(torch.equal(outputs[key], expected[key]) for key in expected), name


def test_activations_are_calibrated_on_the_first_rows(folder: Path) -> None:
    quanto = ("backend=quanto", "backend.activations_dtype=int8", "backend.calibration_samples=3")
    _, calibrated = experiment(folder, "calibrated", "task.inputs=x.npy", *quanto)
    _, weights_alone = experiment(folder, "weights", "task.inputs=x.npy", "backend=quanto")
    assert not torch.equal(calibrated["hidden"], weights_alone["hidden"])


def test_the_key_is_of_the_inputs_content_and_the_networks_code(folder: Path) -> None:
    before = run_key(config("task.inputs=x.npy"))
    (folder / "copy.npy").write_bytes((folder / "x.npy").read_bytes())
    assert run_key(config("task.inputs=copy.npy")) == before
    np.save("copy.npy", np.zeros((10, 64)))
    assert run_key(config("task.inputs=copy.npy")) != before
    (folder / "mynet.py").write_text(CODE + "\n# changed\n")
    assert run_key(config("task.inputs=x.npy")) != before


def test_text_goes_through_the_tokenizer_and_padding_is_zero(tmp_path: Path) -> None:
    import shutil

    from qexp.models.arithmetic import ASSETS

    save_network("LlamaForCausalLM", tmp_path / "model", torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, tmp_path / "model" / name)
    (tmp_path / "lines.txt").write_text("543+870=\n\n12-\n")
    (tmp_path / "run").mkdir()
    chosen = ("model=transformers", f"model.path={tmp_path / 'model'}", "task=forward", "device=cpu", "backend=none")
    run_experiment(run_config(*chosen, f"task.inputs={tmp_path / 'lines.txt'}"), tmp_path / "run")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    logits = load_file(tmp_path / "run" / "outputs.safetensors")["logits"]
    for row, line in zip(logits, ("543+870=", "12-"), strict=True):
        encoded = tokenizer(line, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = model(encoded).logits[0]
        assert torch.allclose(row[: len(alone)], alone, atol=1e-4)
        assert not row[len(alone) :].any()
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"is text, but '.*' has no tokenizer"):
        run_config(*chosen, f"task.inputs={tmp_path / 'lines.txt'}")


# Inputs that do not fit


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, r"task\.inputs=null names no inputs"),
        ("x.csv", "1,2", r"must end with \.npy, \.safetensors or \.txt"),
        ("gone.npy", None, "is no file"),
        ("x.npy", "text", r"is no \.npy file of numbers"),
        ("x.npy", np.array(["a", "b"]), "holds <U1, which are no numbers"),
        ("x.safetensors", "text", "task.inputs: .*is not a safetensors file, or truncated"),
        ("x.safetensors", {"x": torch.zeros(3, 2), "y": torch.zeros(4)}, "the same number of rows.*x 3, y 4"),
        ("x.safetensors", {"x": torch.zeros(0, 2)}, "the same number of rows, 1 or more"),
        ("x.txt", "  \n\n", "has no lines of text"),
        ("x.txt", b"\xff\xfe", "it is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_inputs(name: str | None, content: Any, words: str, tmp_path: Path) -> None:
    path = None if name is None else tmp_path / name
    if path is not None and isinstance(content, dict):
        save_file(content, path)
    elif path is not None and isinstance(content, np.ndarray):
        np.save(path, content)
    elif path is not None and content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words):
        check_file(ForwardConfig(inputs=None if path is None else str(path)))


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, images: Tensor, labels: Tensor, *, guidance: Tensor | None = None) -> Tensor:
        return self.layer(images)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"image": torch.zeros(2, 4)}, r"takes no 'image' \(did you mean images\?\); its arguments are guidance, im"),
        ({"images": torch.zeros(2, 4)}, "needs labels besides images"),
        ({"images": torch.full((2, 4), torch.nan), "labels": torch.zeros(2)}, "'images' has values that are not fin"),
    ],
)  # fmt: skip
def test_tensors_that_forward_does_not_take(tensors: Any, words: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=words):
        read_inputs(ForwardConfig(inputs=str(tmp_path / "x.safetensors")), None, Picky())


def test_a_name_that_only_keywords_would_take_is_checked_by_their_annotation(tmp_path: Path) -> None:
    """transformers' forwards end with `**kwargs: Unpack[TransformersKwargs]`: a typo would be ignored."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1))
    save_file({"input_id": torch.zeros(2, 3, dtype=torch.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"takes no 'input_id' \(did you mean input_ids"):
        read_inputs(ForwardConfig(inputs=str(tmp_path / "x.safetensors")), None, model)


def test_shapes_that_the_network_refuses_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Picky cannot be called with .*images float32 \[2\].*labels"):
        call_network(Picky(), {"images": torch.zeros(2), "labels": torch.zeros(2), "other": torch.zeros(2)}, CPU)


def test_whole_numbers_stay_and_others_are_cast() -> None:
    cast = in_dtype({"a": torch.zeros(2, dtype=torch.float64), "b": torch.arange(2), "c": torch.ones(2) > 0}, BF16)
    assert [tensor.dtype for tensor in cast.values()] == [BF16, torch.int64, torch.bool]


# What is returned


@dataclass
class Result:
    sample: Tensor
    note: str


Pair = namedtuple("Pair", "first second")


def test_every_floating_point_tensor_has_a_dotted_name() -> None:
    x = torch.zeros(2)
    value = {"a": [x, torch.arange(2)], "b": Result(x, "text"), "c": (Pair(x, None), {"d": x}), "e": None}
    assert [name for name, _ in tensors_of(value)] == ["a.0", "b.sample", "c.0.first", "c.1.d"]
    assert [name for name, _ in tensors_of(x)] == ["output"]
    assert [name for name, _ in tensors_of((x, x))] == ["0", "1"]


class Summing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def test_outputs_that_do_not_go_by_rows() -> None:
    inputs = {"x": torch.ones(6, 2)}
    one = run_forward(context_of(ForwardConfig(batch_size=6), models={"model": Summing()}, inputs=inputs))
    assert one.outputs["output"] == 12
    with pytest.raises(ConfigError, match=r"'output' has no row for each of the inputs'.*set task\.batch_size=6"):
        run_forward(context_of(ForwardConfig(batch_size=4), models={"model": Summing()}, inputs=inputs))
    with pytest.raises(ConfigError, match="returns a Tensor without floating-point tensors"):
        run_forward(context_of(ForwardConfig(), models={"model": Counting()}, inputs=inputs))
