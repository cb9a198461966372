"""Every mistake that composing can find is one message: value, rule, place, remedy, and what would be valid."""

from pathlib import Path

import pytest

from qexp.cli.hydra_errors import explain
from qexp.system import devices
from tests.assigning import run_config
from tests.composing import CommandLine
from tests.composing import command as command
from tests.products import representatives

USER_YAMLS = {
    "backend/unknown": "defaults: [/schema/backend/torchao@_here_, _self_]\nquant_typ: int8wo\n",
    "backend/badtype": "defaults: [/schema/backend/quanto@_here_, _self_]\nweights_dtype: [a]\n",
    "backend/noschema": "quant_method: quanto\nweight_dtype: int4\n",
    "backend/noplugin": "defaults: [/schema/backend/torchaoo@_here_, _self_]\n",
    "backend/noparent": "defaults: [torchaoo, _self_]\n",
    "backend/syntax": "quant_method: quanto\n weights_dtype: : 4\n",
    "backend/mine": "defaults: [torchao, _self_]\nquant_type: int8dq\n",
    "experiment/unknown": "# @package _global_\nsede: 3\n",
    "experiment/badgroup": "# @package _global_\ndefaults:\n  - override /backnd: none\n",
    "experiment/badoption": "# @package _global_\ndefaults:\n  - override /backend: nonee\n",
    "experiment/assigned": "# @package _global_\nbackend: quanto\n",
    "offload/typo": "strategi: leaf\n",
    "offload/list": "- leaf\n",
}


MISTAKES = {
    "backend=torchoa": "backend=torchoa is unknown (did you mean torchao",
    "backend=null": "backend=null chooses nothing; use bitsandbytes, ",
    "experiment=null": "leave it out, or use backend_pareto, flux_dev_16gb, mixed_pareto or roundtrip_all",
    "+backend@components.transformer.backend=nope": "backend=nope is unknown (did you mean none?); use bitsandbytes, ",
    "bakend=none": "bakend=none is not a known field (did you mean backend?); valid here: backend, ",
    "a.b.c=3": "a.b.c=3 is not a known field; valid here: backend, ",
    "backend.quant_typ=3": "not a known field of backend bitsandbytes (did you mean quant_method",
    "backend.weights_dtype=int4": "only of backend=quanto, quanto_float8, quanto_int2 or quanto_int4",
    "offload.too=disk": "offload.too=disk is not a known field (did you mean to?); valid here: low_cpu_mem, ",
    "hydra.foo=3": "hydra.foo=3 is not a known field",
    "seed=abc": "seed=abc must be an integer",
    "seed=null": "seed=null must be an integer",
    "backend.load_in_4bit=maybe": "backend.load_in_4bit=maybe must be true or false",
    "backend.llm_int8_threshold=high": "backend.llm_int8_threshold=high must be a number",
    "device=[1,2]": "device=[1,2] must be a string",
    "metrics.names=ssim": "metrics.names=ssim must be a list, such as [a,b]",
    "tracking.mode=onlin": "tracking.mode=onlin is unknown (did you mean online or offline?)",
    "backend=none,torchao": "gives several values to one experiment; add -m to run one for each",
    "skip_modules=a,b": "or write skip_modules=[a,b] for a list",
    "seed=choice(1,2)": "seed=choice(1,2) gives several values to one experiment; add -m",
    "components.transformer.compute_dtype=bf16": "write +components.transformer.compute_dtype=bf16",
    "components.transfomer.compute_dtype=fp32": "write +components.transfomer.compute_dtype=fp32",
    "+components.transfomer.compute_dtype=fp32": "(did you mean transformer?); use transformer",
    "task.pipeline_arguments.eta=1": "write +task.pipeline_arguments.eta=1",
    "backend=[none,torchao]": "TorchAoConfig and NoneConfig cannot be combined: choose one option of their group",
    "~backnd": "~backnd deletes nothing (did you mean backend?)",
    "+seed=3": "An item is already at 'seed'.; Either remove + prefix: 'seed=3'",
    "seed": "seed is not a setting (key=value); write seed=<value>",
    "qexp.doctor": "qexp.doctor is a command and comes first; write python -m qexp doctor",
    "predcit": "predcit is not a setting (key=value) (did you mean predict?); use key=value, or a",
    "task": "task is a group and needs an option: task=<name>; use forward, generate, ",
    "quanto_int4": "write backend=quanto_int4",
    "sweep.notes=grün": """cannot read sweep.notes=grün: a value with""",
    "paths.outputs=/data/a#b": """; write 'paths.outputs="/data/a#b"'""",
    "sweep.notes='abc": """(a quote is not closed): a value with""",
    "sweep.notes=wow!": """; write 'sweep.notes="wow!"'""",
    "model.path=/tmp/${}": r"""; write 'model.path="/tmp/\${}"'""",
    "model.path=/tmp/${x}": "${…} refers to another setting: if the characters are meant, put a backslash before them",
    "compute_dtype=None": "compute_dtype=None is the text 'None'; for no value write compute_dtype=null",
    "model.path=None": "for no value write model.path=null",
    "task.batch_size=None": "task.batch_size=None must be an integer, or null",
    "save.path=undefined": "for no value write save.path=null",
    "backend=nf4": "backend=nf4 is unknown (did you mean backend=bitsandbytes?); use bitsandbytes, ",
    "backend=gptq": "backend=gptq is unknown (a format that is made by a program of its own, and not here); use bits",
    "skip_modules=[a..b]": "skip_modules: 'a..b' can match no module; a pattern is a dotted name, not a regex",
    "skip_modules=['blocks/0']": "skip_modules: 'blocks/0' can match no module",
    "keep_in_fp32_modules=['.*norm$']": "keep_in_fp32_modules: '.*norm$' can match no module",
    "sweep.notes=a=b": "quoted twice",
    'device_map={"": cpu}': "what device_map does not name is '*': 'device_map={*: cpu}'",
    "device_map={a: 0,'':cpu}": "what device_map does not name is '*'",
    "seed=[1,2": "cannot read seed=[1,2: a ] is missing; put quotes around the override if it has spaces",
    "device=cuda": "device=cuda needs CUDA device 0, and this machine, or its torch build, has none; use cpu or auto",
    "backend=": "backend= chooses nothing; use bitsandbytes, ",
    "backend=TorchAO": "backend=TorchAO is unknown (did you mean torchao?)",
    "backend=qexp_packed": "(did you mean backend=packed_fp4_e2w1, ",
    "backend=gguf_q4_k_m": "(a GGUF type that only llama.cpp makes",
    "offload=cpu": "offload=cpu is unknown (it is where weights rest: write offload=leaf offload.to=cpu); use block, ",
    "offload=true": "offload=true chooses nothing; use block, ",
    "metrics=ssim": "metrics=ssim is unknown (it is a metric: write metrics.names=[ssim]); use ",
    "reference=none": "reference=none stands where a group of fields belongs; set reference.dtype or reference.offload",
    "components=transformer": "a group of fields for each component: +components.transformer.compute_dtype=bf16",
    "seed==3": "seed==3 has two =; write seed=3",
    "=3": "=3 has no name in front of the =; write key=3",
    "backend = torchao": "backend = torchao has spaces around the =; write backend=torchao",
    "backend=quanto,": "backend=quanto, ends with a comma; write backend=quanto, or another value behind it",
    "skip_modules=[proj_out, x": "cannot read skip_modules=[proj_out, x: a ] is missing; put quotes",
    "--seed": "--seed is a setting, not a flag; write seed=<value>, without dashes",
    "backend:": "backend is a group and needs an option: backend=<name>; use bitsandbytes, ",
    "--config-name=nope": "--config-name nope is not found; leave it out, or add --config-dir",
    "--config-dir=nope": "nope is not a folder; give one with options in <group>/<name>.yaml",
    "+backend=torchao": "+backend=torchao adds a second option to backend; write backend=torchao",
    "++backend=torchao": "++backend=torchao adds a second option to backend; write backend=torchao",
    "model=meta-llama/Llama-3": "(it is a path or a repository: write model=<kind> model.path=meta-llama/Llama-3)",
    "model=./net": "model=./net is unknown (it is a path or a repository: write model=<kind> model.path=./net)",
    "model.path=~/net": "the shell does not expand ~ behind =; write model.path=$HOME/net",
    "model.path=": "model.path= is empty; give a folder or a file",
    "model.path=https://huggingface.co/user/name": "is an address, not a path; give a folder or a file, or",
    "paths.outputs=": "paths.outputs= is empty; give a folder, which need not exist",
    "device=gpu": "device=gpu is unknown (did you mean cuda?)",
    "device=0": "device=0 is unknown (did you mean cuda:0?)",
    "seed=range(a,b)": "cannot read seed=range(a,b); write seed=choice(a,b), seed=range(0,4) or seed=glob(*)",
    "--resolve": "--resolve changes what --cfg prints; add --cfg job",
    "--task.num_images=3": "--task.num_images is a setting, not a flag; write task.num_images=<value>",
    "task.steps=20": "is not a known field of task generate (did you mean num_inference_steps?)",
    "help": "help is not a setting (key=value); write --help",
    "~task.num_images": "~task.num_images deletes nothing; leave it out, or write task.num_images=null for the default",
}
BEFORE_COMPOSING = (  # flags, and what Hydra refuses before it composes one experiment
    "skip_modules=a,b", "seed=choice(1,2)", "=3", "--seed", "--config-name=nope", "--config-dir=nope", "--resolve",
    "--task.num_images=3",
)  # fmt: skip
TYPED = (  # one of each step behind it: options, values, what they mean, words, quotes
    *BEFORE_COMPOSING, "backend=torchoa", "seed=abc", "tracking.mode=onlin", "quanto_int4", "sweep.notes=grün",
)  # fmt: skip
SWEEP_MISTAKES = {
    "backend=none,nope": "backend=nope is unknown (did you mean none?)",
    "seed=1,x": "seed=x must be an integer",
    "seed=interval(0,1)": "does not support sweep type : INTERVAL_SWEEP",
    "sweep.name=a/b": "sweep.name='a/b' must be a folder's name",
    "seed=range(3,3)": "seed=range(3,3) has no value, so the sweep has no experiment; give one or more",
    "backend=glob(*),none": "backend=glob(*),none: glob(...), range(...) and choice(...) cannot be part of a list",
    "seed=range(0,3),7": "list every value, such as seed=a,b, or give one of them alone",
    "backend=glob(zzz*)": "backend=glob(zzz*) has no value, so the sweep has no experiment",
}
EACH_RULE_OF_SWEEPS = [  # the others break a rule that one of these breaks
    name for name in SWEEP_MISTAKES if name not in ("seed=range(0,3),7", "backend=glob(zzz*)", "seed=1,x")
]
YAML_MISTAKES = {
    "backend=unknown": "backend.quant_typ (in backend/unknown.yaml) is not a known field of backend torchao",
    "backend=badtype": "backend.weights_dtype (in backend/badtype.yaml) must be a string",
    "backend=noschema": "backend.weight_dtype is not a known field (did you mean weights_dtype?)",
    "backend=noplugin": "/schema/backend/torchaoo (in backend/noplugin.yaml) is no schema (did you mean torchao?)",
    "backend=noparent": "backend=torchaoo (in backend/noparent.yaml) is unknown (did you mean torchao",
    "backend=syntax": 'backend/syntax.yaml", line 2, column 15',
    "experiment=unknown": "sede (in experiment/unknown.yaml) is not a known field (did you mean seed",
    "experiment=badgroup": "backnd (in experiment/badgroup.yaml) is no group of options (did you mean backend?)",
    "experiment=badoption": "backend=nonee is unknown (did you mean none?)",
    "experiment=assigned": "to choose an option write 'override /backend: quanto' in the yaml's defaults",
    "offload=typo": "offload.strategi (in offload/typo.yaml) is not a known field (did you mean strategy?)",
    "offload=list": "['leaf'] (in offload/list.yaml) stands where a group of fields belongs: low_cpu_mem, ",
}


@pytest.mark.parametrize("argument", [argument for argument in MISTAKES if argument not in BEFORE_COMPOSING])
def test_a_mistake_is_explained(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)
    with pytest.raises(Exception) as caught:
        run_config(argument)
    message = explain(caught.value, [argument])
    assert MISTAKES[argument] in message and "\n" not in message


@pytest.mark.parametrize("argument", representatives(MISTAKES, TYPED))
def test_a_mistake_on_the_command_line_is_one_message(command: CommandLine, argument: str, tmp_path: Path) -> None:
    assert MISTAKES[argument] in command.refusal(argument)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["task.prompt=a", "red", "cube"],
            """red has no =: the shell splits a value at its spaces, so it is quoted twice; write 'task.p""",
        ),
        (["max_memory={cpu:", "2GiB}", "seed=1"], "put quotes around it: 'max_memory={cpu: 2GiB}'"),
        (["seed=1", "quanto_int4"], "write backend=quanto_int4"),
        (["backend", "torchao"], "backend is a group and needs an option"),
    ],
)
def test_what_the_shell_has_split_is_shown_as_it_is_to_be_typed(
    command: CommandLine, arguments: list[str], message: str
) -> None:
    assert message in command.refusal(*arguments)


@pytest.mark.parametrize("setting", ["paths.outputs", "save.path"])
def test_a_file_in_the_place_of_a_folder_is_refused(command: CommandLine, setting: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is a file; give a folder, which need not exist" in command.refusal(f"{setting}=notes.txt")


@pytest.mark.parametrize("argument", representatives(SWEEP_MISTAKES, EACH_RULE_OF_SWEEPS))
def test_a_sweep_with_a_mistake_is_one_message_and_leaves_no_folder(
    command: CommandLine, argument: str, tmp_path: Path
) -> None:
    assert SWEEP_MISTAKES[argument] in command.refusal("-m", argument)
    assert list(tmp_path.glob("outputs/sweeps/*")) == []


def test_a_field_that_not_all_swept_backends_have_names_those_that_do(command: CommandLine) -> None:
    message = command.refusal("-m", "backend=torchao,none", "backend.quant_type=int8dq,int8wo")
    assert message.startswith("backend.quant_type=int8dq is not a known field of backend none, only of backend=")
    assert " torchao, torchao_float8wo, " in message and " quanto" not in message


@pytest.mark.parametrize("argument", YAML_MISTAKES)
def test_a_mistake_in_a_yaml_is_one_message_that_names_the_file(
    command: CommandLine, argument: str, tmp_path: Path
) -> None:
    for name, text in USER_YAMLS.items():
        path = Path(tmp_path, f"{name}.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert YAML_MISTAKES[argument] in command.refusal("--config-dir", str(tmp_path), argument)


def test_a_yaml_of_ones_own_is_an_option(command: CommandLine, tmp_path: Path) -> None:
    Path(tmp_path, "backend").mkdir()
    Path(tmp_path, "backend", "mine.yaml").write_text(USER_YAMLS["backend/mine"])
    assert command("--config-dir", str(tmp_path), "backend=mine") == 0
    assert command.configs[0].components["transformer"].backend.quant_type == "int8dq"
