"""The programs that `bench_load.py` compares, each run in a process of its own:

    python scripts/bench_load_programs.py PROGRAM FORMAT CHECKPOINT SMALL_CHECKPOINT [--warm]

qexp        `qexp.load`
diffusers   `from_pretrained` with a quantization config, of transformers where that has the model's class; its refusal
            of bitsandbytes without a GPU patched open
convert     `from_pretrained` without quantization, then the library's own conversion in memory
kernels     the quantizing of qexp alone, on one thread, from dense weights in memory: what a pipeline cannot do without

Before the clock starts, torch, the model's class and the library of the format are imported, and of qexp what
`from qexp import load` imports: import_seconds are from the start of the process until then. wall_seconds are from the
call to the returned model, touched_seconds until a byte of every page of the weights has been read: stored files may be
mapped, and are then not in memory before. With --warm the small checkpoint is loaded first, so that peaks are those of
the weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benching import Stopwatch, serve, wait_for_start
from torch import Tensor, nn

BF16 = torch.bfloat16
PAGE_BYTES = 4096


class Format(NamedTuple):
    """option: of conf/backend; library: what quantizes; stored: the option that a checkpoint was quantized with."""

    option: str = "none"
    library: str = ""
    stored: str = ""


FORMATS = {  # by the name in the tables
    "dense": Format(),
    "nf4": Format("bitsandbytes", "bitsandbytes"),
    "int8": Format("bitsandbytes_int8", "bitsandbytes"),
    "torchao int8wo": Format("torchao", "torchao.quantization"),
    "quanto int8": Format("quanto", "optimum.quanto"),
    "nf4, stored": Format(library="bitsandbytes", stored="bitsandbytes"),
    "torchao int8wo, stored": Format(library="torchao.quantization", stored="torchao"),
    "gguf Q4_0, stored": Format(library="gguf", stored="gguf_q4_0"),
}
STORED = {name: one.stored for name, one in FORMATS.items() if one.stored}


def format_of(name: str) -> Format:
    """Return one of `FORMATS`, or the format of any other option of conf/backend."""
    return FORMATS.get(name, Format(name))


def model_class(folder: Path) -> Any:
    """Return the class of diffusers or transformers that config.json names."""
    import diffusers
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"])
    return getattr(transformers, config["architectures"][0])


def import_libraries(folder: Path, name: str) -> None:
    """Import what a program that loads such a model imports at its top."""
    model_class(folder)
    if library := format_of(name).library:
        importlib.import_module(library)


def backend_config(name: str) -> Any:
    """Return the backend config of a format: one of `FORMATS`, or any option of conf/backend."""
    from qexp.config.backend_options import backend_of

    return backend_of(format_of(name).option)


def call_qexp(folder: Path, name: str, workers: int | None = None) -> nn.Module:
    """Load as a user does."""
    import qexp

    option = format_of(name).option
    return qexp.load(folder, None if option == "none" else option, device="cpu", compute_dtype=BF16, workers=workers)


def load_with_qexp(folder: Path, name: str, workers: int | None = None) -> Any:
    """Return a `LoadedComponent`."""
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.loading.lifecycle import load_component
    from qexp.models.folder import FolderSource

    settings = ComponentConfig(backend_config(name), compute_dtype="bfloat16")
    source = FolderSource(folder, None)
    loader = LoaderConfig(workers=workers)
    return load_component(source, "model", settings, device=torch.device("cpu"), loader=loader)


def load_with_diffusers(folder: Path, name: str) -> nn.Module:
    kind = model_class(folder)
    library = importlib.import_module(kind.__module__.partition(".")[0])
    patch_open(library)
    configs: dict[str, Callable[[], Any]] = {
        "nf4": lambda: library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16
        ),
        "int8": lambda: library.BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8wo": lambda: library.TorchAoConfig(_int8wo()),
        "quanto int8": lambda: library.QuantoConfig("int8"),
    }
    if name == "gguf Q4_0, stored":
        config = library.GGUFQuantizationConfig(compute_dtype=BF16)
        model: nn.Module = kind.from_single_file(
            str(folder / "model.gguf"), config=str(folder), quantization_config=config, torch_dtype=BF16
        )
        return model
    if name not in {*configs, "dense", *STORED}:
        raise SystemExit(f"diffusers: {name} is not compared; use one of {', '.join(FORMATS)}")
    config = configs[name]() if name in configs else None
    return kind.from_pretrained(folder, quantization_config=config, torch_dtype=BF16)


def patch_open(library: Any) -> None:
    """Take out what refuses bitsandbytes without a GPU; without one, everything goes to the CPU."""
    if library.__name__ == "diffusers":
        import diffusers.quantizers.bitsandbytes.bnb_quantizer as gated

        quantizers = [gated.BnB4BitDiffusersQuantizer, gated.BnB8BitDiffusersQuantizer]
    else:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        quantizers = [AUTO_QUANTIZER_MAPPING[method] for method in ("bitsandbytes_4bit", "bitsandbytes_8bit")]
    for quantizer in quantizers:
        quantizer.validate_environment = lambda self, *arguments, **fields: None
        quantizer.update_device_map = lambda self, device_map: device_map or {"": "cpu"}


def convert_in_memory(folder: Path, name: str) -> nn.Module:
    model = load_with_diffusers(folder, "dense")
    if name == "torchao int8wo":
        from torchao.quantization import quantize_

        quantize_(model, _int8wo())
    elif name == "quanto int8":
        from optimum.quanto import freeze, qint8, quantize

        quantize(model, weights=qint8)
        freeze(model)
    else:
        raise SystemExit(f"convert: {name} has no conversion in memory; use torchao int8wo or quanto int8")
    return model


def _int8wo() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def quantize_alone(folder: Path, name: str) -> Callable[[], None]:
    """Prepare; what is returned quantizes every layer that a load would, in its order."""
    from qexp.config.schema import ComponentConfig
    from qexp.loading.lifecycle import request_load
    from qexp.loading.prepare import load_quantizer_of, prepare
    from qexp.models.folder import FolderSource

    settings = ComponentConfig(backend_config(name), compute_dtype="bfloat16")
    source = FolderSource(folder, None)
    cpu = torch.device("cpu")
    request = request_load(source, "model", settings, device=cpu)
    quantizer = load_quantizer_of(request)
    prepared = prepare(request, quantizer)
    specs = [item.spec for item in prepared.plan.quantized if item.spec is not None and not item.companions]
    weights: dict[tuple[int, int], Tensor] = {}
    for spec in specs:  # one weight of each shape is enough to compute on
        weights.setdefault(spec.shape, torch.empty(spec.shape, dtype=BF16).normal_(std=0.02))

    def run() -> None:
        with torch.no_grad():
            for spec in specs:
                quantizer.create_quantized_param(spec, [weights[spec.shape]], {}, cpu)

    return run


def touch(model: nn.Module) -> None:
    """Read a byte of every page of the weights: what a program has only mapped is in memory then."""
    from qexp.offloading.payload import leaves

    for tensor in (*model.parameters(), *model.buffers()):
        for leaf in leaves(tensor):
            leaf.detach().reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("qexp", "diffusers", "convert", "kernels"))
    parser.add_argument("format", help=f"{', '.join(FORMATS)}, or an option of conf/backend (qexp, kernels)")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--slice-weights", type=int, help="weights that a kernel of qexp is given at a time")
    parser.add_argument("--warm", action="store_true", help="load the small checkpoint first")
    arguments = parser.parse_args()
    name, warm = arguments.format, arguments.warm or arguments.program == "kernels"
    work: Callable[[Path], Any]
    if arguments.program == "qexp":
        load: Callable[..., Any] = load_with_qexp if warm else call_qexp
        work = partial(load, name=name, workers=arguments.workers)
    elif arguments.program == "kernels":
        torch.set_num_threads(1)
        quantize_alone(arguments.small, name)()
        run = quantize_alone(arguments.checkpoint, name)

        def work(folder: Path) -> Any:
            if folder == arguments.checkpoint:
                run()
    else:
        work = partial(convert_in_memory if arguments.program == "convert" else load_with_diffusers, name=name)
    import_libraries(arguments.checkpoint, name)
    if arguments.program == "qexp":
        import qexp.api.models  # noqa: F401  # what `from qexp import load` imports
    if arguments.program == "qexp" and arguments.slice_weights is not None:
        from qexp.quantizers.rows import SLICE_WEIGHTS

        SLICE_WEIGHTS["cpu"] = arguments.slice_weights
    imported = seconds_since_start()
    kept: Any = work(arguments.small) if warm else None
    wait_for_start()
    with Stopwatch() as watch:
        kept = work(arguments.checkpoint)
    result: dict[str, Any] = {"import_seconds": imported, **watch.result()}
    if arguments.program != "kernels":
        started = time.perf_counter()
        touch(getattr(kept, "model", kept) if warm else kept)
        result["touched_seconds"] = result["wall_seconds"] + time.perf_counter() - started
    if arguments.program == "qexp" and warm:
        plan = kept.plan.to_container()
        result |= {"quantized_bytes": plan["result_bytes"], "dense_bytes": plan["dense_bytes"]}
        result["largest_dense_bytes"] = max(item.dense_nbytes for item in kept.plan.items)
        result |= {f"{part}_seconds": getattr(kept.times, part) for part in ("plan", "warm_up", "read")}
    serve(result)


def seconds_since_start() -> float:
    """Return how old this process is."""
    import psutil

    return time.time() - psutil.Process().create_time()


if __name__ == "__main__":
    main()
