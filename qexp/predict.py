"""What published models take, before anything is downloaded: bytes of each component, for each backend.

    python -m qexp.predict                                       # every one that is known
    python -m qexp.predict flux_dev --backends bitsandbytes gguf_q4_0
    python -m qexp.predict flux_dev --compute-dtype float16 --markdown

The numbers are those of the loading plan, of networks at true size on the meta device: exact bytes of the weights, with
scales, what skip lists leave unquantized, and what a format cannot hold. Components are quantized by themselves: add
up what you quantize and what you do not. While it loads, a component takes its largest dense tensor and 128 MiB more
at most; activations are not included.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.config.backend_options import backend_of, model_skip_modules
from qexp.config.schema import ComponentConfig
from qexp.config.yaml_options import option_names
from qexp.errors import ConfigError, QexpError
from qexp.models.architectures import architecture, architecture_names, as_checkpoint, component_of, network
from qexp.models.diffusers import DENOISERS

GIB = 1 << 30
BACKENDS = ("bitsandbytes_int8", "torchao", "bitsandbytes", "bitsandbytes_nf4_dq", "gguf_q4_0", "packed_uint3")


@dataclass(frozen=True)
class Prediction:
    """Bytes of a component's weights once loaded. skipped: linear layer that stays unquantized -> why."""

    result_bytes: int
    largest_dense_bytes: int
    quantized: tuple[str, ...]
    skipped: Mapping[str, str]

    @property
    def loading_bytes(self) -> int:
        """The most that a load may take."""
        return self.result_bytes + self.largest_dense_bytes + (128 << 20)


class _Published:
    """A component without files, as a model source."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def skeleton(self, component: str, config: dict[str, Any]) -> Any:
        return network(self.config)

    def conversion(self, component: str, model: Any, checkpoint: Any) -> Any:
        from qexp.models.transformers_networks import renaming

        return renaming(model) if hasattr(model, "base_model_prefix") else None


def predict(
    name: str, component: str, backend: Any, compute_dtype: str, skip_modules: Sequence[str] = ()
) -> Prediction:
    """backend: a backend's config, as resolved for a CPU. Raises: QexpError for what cannot be loaded."""
    import torch

    from qexp.loading.prepare import prepare
    from qexp.quantizers.base import load_quantizer

    found = component_of(name, component)
    checkpoint = as_checkpoint(found, network(found.config), Path(name))
    settings = ComponentConfig(backend, tuple(skip_modules), compute_dtype=compute_dtype)
    source: Any = _Published(found.config)
    device = torch.device("cpu")
    prepared = prepare(source, component, settings, checkpoint, load_quantizer(backend), device=device)
    prepared.check_patterns()
    plan = prepared.plan
    return Prediction(
        sum(item.result_nbytes for item in plan.distinct),
        max(item.dense_nbytes for item in plan.items),
        tuple(plan.quantized_nbytes),
        plan.skipped,
    )


def _gib(name: str, component: str, option: str, compute_dtype: str, known: dict[Any, str]) -> str:
    """The bytes of one cell, or why there are none. known: those of the same network before."""
    skip = _skip_modules(name) if component in DENOISERS and option != "none" else ()
    found = component_of(name, component)
    key = (json.dumps(found.config), found.dtype, option, compute_dtype, skip)
    if key not in known:
        try:
            predicted = predict(name, component, backend_of(option).resolved("cpu"), compute_dtype, skip)
            known[key] = f"{predicted.result_bytes / GIB:.2f}"
        except QexpError as error:
            print(f"{name}/{component}, {option}: {error}", file=sys.stderr)
            known[key] = "–"
    return known[key]


def _skip_modules(name: str) -> tuple[str, ...]:
    return model_skip_modules(name) if name in option_names("model") else ()


def rows(names: Sequence[str], backends: Sequence[str], compute_dtype: str) -> list[list[str]]:
    """A row for each component of each model: what it is, then GiB: on disk, dense, and for each backend."""
    import torch

    found, known = [], dict[Any, str]()
    for name in names:
        for component, part in architecture(name).components.items():
            disk = part.parameters * getattr(torch, part.dtype).itemsize / GIB
            options = ("none", *_useful(component, backends))
            said = io.StringIO()  # what is said of a network is said once, not for each backend
            try:
                with redirect_stderr(said):
                    cells = [_gib(name, component, option, compute_dtype, known) for option in options]
            finally:
                for line in dict.fromkeys(said.getvalue().splitlines()):
                    print(f"{name}: {line}", file=sys.stderr)
            cells += ["–"] * (1 + len(backends) - len(cells))  # a decoder of convolutions has nothing to quantize
            found.append([name, component, f"{part.parameters / 1e9:.2f}", f"{disk:.2f}", *cells])
    return found


def _useful(component: str, backends: Sequence[str]) -> Sequence[str]:
    return () if component == "vae" else backends


def table(found: list[list[str]], backends: Sequence[str], markdown: bool) -> str:
    head = ["model", "component", "B weights", "files", "dense", *backends]
    if markdown:
        lines = [head, ["---", "---", *["--:"] * (len(head) - 2)], *found]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[column]) for line in [head, *found]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *found]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qexp.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(architecture_names())}; default: all")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="options of conf/backend")
    parser.add_argument("--compute-dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    try:
        for option in arguments.backends:
            backend_of(option)
        for name in arguments.models:
            if "=" in name:
                raise ConfigError(f"{name} is an override; predict takes none, and shows every component")
            architecture(name)
        found = rows(arguments.models or architecture_names(), arguments.backends, arguments.compute_dtype)
    except QexpError as error:
        raise SystemExit(str(error)) from None
    print(table(found, arguments.backends, arguments.markdown))


if __name__ == "__main__":
    main()
