"""Show what a model takes, before anything is downloaded or read: bytes of its weights, and whether they fit.

    python -m qexp.predict                               every published model that is known
    python -m qexp.predict flux_dev --backends bitsandbytes gguf_q4_0
    python -m qexp.predict flux_dev memory=16GiB         what fits on a device of that size, and with which offload
    python -m qexp.predict model=diffusers model.path=<folder> backend=torchao memory=16GiB
    python -m qexp.predict experiment=flux_dev_16gb memory=12GiB --markdown

A published name shows every component quantized, all but the autoencoder. Overrides, as of an experiment, show what
that experiment loads; backend=a,b compares backends. The numbers are those of the loading plan, from headers alone:
exact bytes of the weights, with scales, what skip lists leave unquantized, and what a format cannot hold. Activations
are not included. memory= takes a size such as 16GiB, 500MiB or 24GB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from qexp.cli.backend_words import other_word
from qexp.config.dataclass_io import field_types, from_plain
from qexp.config.hydra_schema import compose_settings
from qexp.config.offload import OffloadConfig
from qexp.config.schema import RunConfig, TopLevelConfig
from qexp.config.yaml_options import group_names, option_names
from qexp.errors import ConfigError, LoadError, QexpError, choices, did_you_mean
from qexp.models.architectures import architecture, architecture_names, write_headers
from qexp.predict.tables import UNITS, ModelForecast, formatted, offload_table, size, unit_of, weights_table
from qexp.quantizers.configs import compute_dtype
from qexp.system.command_parser import CommandParser
from qexp.system.devices import parse_bytes
from qexp.system.program_name import program_name
from qexp.system.screen import library_output_in, say, sayings_in
from qexp.system.standard_streams import survive_closed_pipes

BACKENDS = ("none", "bitsandbytes_int8", "torchao", "bitsandbytes", "bitsandbytes_nf4_dq", "gguf_q4_0", "packed_uint3")
OF_RUNS = ("device_map", "max_memory")  # settings that place modules in another way than offloading


def forecast(name: str, overrides: Sequence[str], backends: Sequence[str]) -> ModelForecast:
    """Return the forecast of the model in `overrides`, for each backend. name: its name in tables.

    Raises: QexpError, or Hydra's errors, for settings that do not resolve in any backend.
    """
    from qexp.loading.forecast import forecast_components, forecast_offload
    from qexp.models.base import load_source

    columns, offloads, names = dict[str, Any](), dict[str, Any](), tuple[str, ...]()
    failures: list[tuple[str, str, QexpError]] = []  # backend, component, why it cannot be planned
    with _repeated_once(name), local_models() as headers_of:
        for backend in backends:
            config, offload = resolved([*overrides, f"backend={backend}"], headers_of)
            names = tuple(config.components)
            columns[backend], failed = forecast_components(load_source(config.model), config, offload)
            failures += [(backend, component, error) for component, error in failed.items()]
            if not failed:
                dense = [part.backend.quant_method == "none" for part in config.components.values()]
                offloads[backend] = dict(forecast_offload(list(columns[backend].values()), offload, dense))
        if failures and not any(columns.values()):
            raise failures[0][2]  # no backend can hold any of it: the files are at fault
        for backend, component, error in failures:
            say(f"{component}, backend={backend}: {error}")
    return ModelForecast(name, names, columns, offloads)


def resolved(overrides: Sequence[str], headers_of: Any) -> tuple[RunConfig, OffloadConfig]:
    """Return (the experiment of `overrides` without its task, its offload settings).

    headers_of: name of a published model -> a folder with its headers.
    """
    from qexp.experiments.resolve import plain_settings, to_run_config

    settings = plain_settings(compose_settings(overrides))
    for name in OF_RUNS:
        if settings.get(name) is not None:
            raise ConfigError(
                f"{name}={settings[name]} places modules, and predict compares offload strategies; leave it out"
            )
    model = settings["model"]
    if model.get("path") is not None:
        model["path"] = _path_here(model["path"], headers_of)
    model |= {name: None for name in ("reference_path", "revision") if name in model}
    for name in ("save", "metrics"):
        settings.pop(name, None)
    settings["task"] = {"name": "roundtrip"}  # every model has it, and it needs no inputs
    return to_run_config(settings), from_plain(OffloadConfig, settings.pop("offload"), "offload")


def _path_here(path: str, headers_of: Any) -> str:
    """Return a local path: the path itself, a snapshot in the cache, or the headers of a published model."""
    from qexp.hub.download import hub_id, local_folder

    found = hub_id(path)
    if found is None:
        return path
    published = [name for name in architecture_names() if architecture(name).repository == found.repo]
    if published:
        return str(headers_of(published[0]))
    try:
        return str(local_folder(path))
    except LoadError as error:
        raise ConfigError(
            f"model.path={path} is not on this machine, and predict downloads nothing ({error}); give a folder, or "
            f"a published model: {choices(architecture_names())}"
        ) from error


@contextmanager
def local_models() -> Iterator[Any]:
    """Provide a function that writes the headers of a published model, once, and returns their folder."""
    with TemporaryDirectory(prefix="qexp-predict-") as scratch:

        def headers_of(name: str) -> Path:
            folder = Path(scratch, name)
            if not folder.exists():
                write_headers(name, folder)
            return folder

        yield headers_of


@contextmanager
def _repeated_once(name: str) -> Iterator[None]:
    """Print messages about a network once, not for each backend."""
    said: list[str] = []
    try:
        with sayings_in(said):
            yield
    finally:
        for line in dict.fromkeys(said):
            say(f"{name}: {line}")


def published_overrides(name: str, compute_dtype: str) -> list[str]:
    """Return the overrides that quantize every component of a published model except the autoencoder."""
    parts = [component for component in architecture(name).components if component != "vae"]
    option = name if name in option_names("model") else "diffusers"
    return [
        f"model={option}",
        f"model.path={architecture(name).repository}",
        f"model.quantize=[{','.join(parts)}]",
        f"compute_dtype={compute_dtype}",
    ]


def _predict_parser(program: str | None = None) -> CommandParser:
    parser = CommandParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.settings = ("memory", *group_names(), *field_types(TopLevelConfig))
    parser.add_argument(
        "what",
        nargs="*",
        metavar="model | key=value",
        help=f"published models ({', '.join(architecture_names())}; default: all), or the overrides of an experiment; "
        "and memory=<size of a device>",
    )
    parser.add_argument("--backends", nargs="+", help="options of conf/backend (default: six of them, or backend=)")
    parser.add_argument(
        "--compute-dtype",
        help="of unquantized weights, such as bf16 (default: bf16 for published names, else as compute_dtype= says)",
    )
    parser.add_argument("--markdown", action="store_true", help="tables in markdown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 with tables, 1 with one line that says why there are none."""
    options = _predict_parser(program_name("predict")).parse(arguments)
    try:
        with TemporaryFile() as log, library_output_in(log):
            answer = _answer(options)
        print(answer)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from qexp.cli.hydra_errors import print_error

        print_error(error, options.what)
        return 1
    return 0


def _answer(options: argparse.Namespace) -> str:
    """Check the command line, then plan; return the text to print. Raises QexpError, or Hydra's errors."""
    asked, words = _split_backends(options.backends or ())
    overrides, names, memory, backends = _sorted_words([*options.what, *words])
    backends = asked or backends or (() if overrides else BACKENDS)
    for backend in backends:
        _check_backend(backend)
    dtype = compute_dtype(options.compute_dtype, "compute_dtype")
    if overrides:
        models = {_name_of_model(overrides): [*overrides, *([f"compute_dtype={dtype}"] if dtype else [])]}
    else:
        models = {name: published_overrides(name, dtype or "bfloat16") for name in names or architecture_names()}
    if not backends:  # the default of these overrides
        backends = (str(compose_settings(overrides, with_hydra=True).hydra.runtime.choices["backend"]),)
    found = [forecast(name, given, backends) for name, given in models.items()]
    unit = unit_of(found)
    parts = [formatted(weights_table(found, backends, unit, memory), 2, options.markdown)]
    if overrides:
        for backend, strategies in found[0].offload.items():
            parts += [f"backend={backend}", formatted(offload_table(strategies, unit, memory), 1, options.markdown)]
    return "\n\n".join([*parts, _footnote(unit, memory)])


def _split_backends(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words after --backends into (backends, settings and models)."""
    names = [name for word in words if "=" not in word for name in word.split(",") if name]
    published = [name for name in names if name in architecture_names()]
    if len(published) == len(names):  # no backend at all: the check of backends says so
        published = []
    return [name for name in names if name not in published], [*published, *(word for word in words if "=" in word)]


def _sorted_words(words: Sequence[str]) -> tuple[list[str], list[str], int | None, Sequence[str]]:
    """Return (overrides, published names, bytes of memory=, backends of backend=). Raises ConfigError."""
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    names = [word for word in words if word not in overrides]
    memory, backends = None, tuple[str, ...]()
    for override in list(overrides):
        key, _, value = override.partition("=")
        if key == "memory":
            memory = _parse_memory(value)
        elif key == "backend":
            backends = tuple(value.split(","))
        else:
            continue
        overrides.remove(override)
    for name in names:
        if name in option_names("model") and name not in architecture_names():
            raise ConfigError(f"{name} is an option of model=, not a published model; write model={name}")
        if name.endswith(("/", ".gguf", ".safetensors")) or Path(name).exists():
            raise ConfigError(
                f"{name} is a path; write model=<kind> model.path={name}, with one of {choices(option_names('model'))}"
            )
        if name not in architecture_names():
            raise ConfigError(_unknown_name(name))
    if names and overrides:
        raise ConfigError(
            f"{overrides[0]} is an override, and {names[0]} a published name, which takes only memory= and backend=; "
            f"write model={names[0]} {overrides[0]} for what an experiment loads"
        )
    return overrides, names, memory, backends


def _unknown_name(name: str) -> str:
    if name in option_names("backend"):
        return f"{name} is an option of backend=, not a model; write backend={name}"
    if name[:1].isdigit():
        return f"{name} is not a published model; write memory={name} for the memory of a device"
    names = architecture_names()
    return (
        f"{name} is not a published model{did_you_mean(name, names)}; use {choices(names)}, or another model with "
        "model=<kind> model.path=<folder>"
    )


def _check_backend(name: str) -> None:
    names = option_names("backend")
    if name not in names:
        raise ConfigError(
            f"backend={name} is unknown{other_word(name) or did_you_mean(name, names)}; use {choices(names)}"
        )


def _parse_memory(value: str) -> int:
    if value.strip().isdigit():
        raise ConfigError(f"memory={value} has no unit; write memory={value.strip()}GiB, or MiB or GB")
    found = parse_bytes(value, "memory")
    if found <= 0:
        raise ConfigError(f"memory={value} must be above 0; give the memory of the device, such as memory=16GiB")
    return found


def _name_of_model(overrides: Sequence[str]) -> str:
    """Return a model's name for tables: of its folder or file, else of its option."""
    given = {key.lstrip("+"): value.strip("'\"") for key, _, value in (one.partition("=") for one in overrides)}
    path = given.get("model.path") or given.get("model.checkpoint")
    return Path(path).name if path else given.get("model") or given.get("experiment") or "model"


def _footnote(unit: str, memory: int | None) -> str:
    lines = [f"1 {unit} = {UNITS[unit]:,} bytes. Weights alone: activations are not included."]
    if memory is not None:
        lines.append(
            f"fits: the weights take no more than the {size(memory, unit)} {unit} of the device, while the model is "
            "loaded and while it runs."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
