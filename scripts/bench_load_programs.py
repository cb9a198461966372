"""The programs that `bench_load.py` compares, each run in a process of its own:

    python scripts/bench_load_programs.py PROGRAM FORMAT CHECKPOINT SMALL_CHECKPOINT

qexp        the streaming loader
diffusers   `from_pretrained` with a quantization config; its refusal of bitsandbytes without a GPU patched open
convert     `from_pretrained` without quantization, then the library's own conversion in memory
kernels     the quantizing of qexp alone, on one thread, from dense weights in memory: what a pipeline cannot do without

A load ends when a byte of every page of the weights has been read: diffusers maps stored files, and would end before
they are in memory. Each program first loads the small checkpoint, so that libraries are imported and threads are
running when the clock starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benching import Stopwatch, serve, wait_for_start
from torch import Tensor, nn

BF16 = torch.bfloat16
PAGE_BYTES = 4096
FORMATS = {  # name in the tables -> option of conf/backend
    "dense": "none",
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes_int8",
    "torchao int8wo": "torchao",
    "quanto int8": "quanto",
    "nf4, stored": "none",
    "gguf Q4_0, stored": "none",
}
STORED = {"nf4, stored": "bitsandbytes", "gguf Q4_0, stored": "gguf_q4_0"}  # format -> option it was quantized with


def flux_source(folder: Path) -> Any:
    """Return the model source of a FLUX transformer in a folder."""
    from qexp.models.folder import FolderSource

    def build(config: dict[str, Any]) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        model: nn.Module = FluxTransformer2DModel.from_config(
            {name: value for name, value in config.items() if name != "quantization_config"}
        )
        return model

    return FolderSource(folder, build)


def backend_config(name: str) -> Any:
    """Return the backend config of a format: one of `FORMATS`, or any option of conf/backend."""
    from qexp.config.backend_options import backend_of

    return backend_of(FORMATS.get(name, name))


def load_with_qexp(folder: Path, name: str, workers: int | None = None, slice_weights: int | None = None) -> Any:
    """Return a `LoadedComponent`. slice_weights: weights that a kernel is given at a time."""
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.loading.lifecycle import load_component
    from qexp.quantizers.rows import SLICE_WEIGHTS

    if slice_weights is not None:
        SLICE_WEIGHTS["cpu"] = slice_weights
    settings = ComponentConfig(backend_config(name), compute_dtype="bfloat16")
    source = flux_source(folder)
    loader = LoaderConfig(workers=workers)
    return load_component(source, "model", settings, device=torch.device("cpu"), loader=loader)


def load_with_diffusers(folder: Path, name: str) -> nn.Module:
    import diffusers
    import diffusers.quantizers.bitsandbytes.bnb_quantizer as gated

    for quantizer in (gated.BnB4BitDiffusersQuantizer, gated.BnB8BitDiffusersQuantizer):
        quantizer.validate_environment = lambda self, *arguments, **fields: None
        quantizer.update_device_map = lambda self, device_map: device_map or {"": "cpu"}
    configs: dict[str, Callable[[], Any]] = {
        "nf4": lambda: diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16
        ),
        "int8": lambda: diffusers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8wo": lambda: diffusers.TorchAoConfig(_int8wo()),
        "quanto int8": lambda: diffusers.QuantoConfig("int8"),
    }
    if name == "gguf Q4_0, stored":
        config = diffusers.GGUFQuantizationConfig(compute_dtype=BF16)
        model: nn.Module = diffusers.FluxTransformer2DModel.from_single_file(
            str(folder / "model.gguf"), config=str(folder), quantization_config=config, torch_dtype=BF16
        )
        return model
    if name not in {*configs, "dense", "nf4, stored"}:
        raise SystemExit(f"diffusers: {name} is not compared; use one of {', '.join(FORMATS)}")
    config = configs[name]() if name in configs else None
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=BF16)
    return model


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

    settings = ComponentConfig(backend_config(name), compute_dtype="bfloat16")
    source = flux_source(folder)
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
    parser.add_argument("--slice-weights", type=int)
    arguments = parser.parse_args()
    work: Callable[[Path], Any]
    if arguments.program == "qexp":

        def work(folder: Path) -> Any:
            return load_with_qexp(folder, arguments.format, arguments.workers, arguments.slice_weights)
    elif arguments.program == "kernels":
        torch.set_num_threads(1)
        quantize_alone(arguments.small, arguments.format)()
        run = quantize_alone(arguments.checkpoint, arguments.format)

        def work(folder: Path) -> Any:
            if folder == arguments.checkpoint:
                run()
    else:
        load = load_with_diffusers if arguments.program == "diffusers" else convert_in_memory

        def work(folder: Path) -> Any:
            return load(folder, arguments.format)

    kept = work(arguments.small)
    wait_for_start()
    with Stopwatch() as watch:
        kept = work(arguments.checkpoint)
        if arguments.program != "kernels":
            touch(kept.model if arguments.program == "qexp" else kept)
    result: dict[str, Any] = watch.result()
    if arguments.program == "qexp":
        plan = kept.plan.to_container()
        result |= {"quantized_bytes": plan["result_bytes"], "dense_bytes": plan["dense_bytes"]}
        result["largest_dense_bytes"] = max(item.dense_nbytes for item in kept.plan.items)
    serve(result)


if __name__ == "__main__":
    main()
