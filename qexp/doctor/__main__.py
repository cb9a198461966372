"""`python -m qexp.doctor`: what runs on this machine, and what the rest needs.

    python -m qexp.doctor                       every option of backend=, and every other type that their fields have
    python -m qexp.doctor torchao gguf --json   two of them, as JSON

Each quantizes a small linear layer through the loader in bf16 and in fp32, runs it, and dequantizes it, on the
CPU and on the first GPU if there is one. Each backend is tried in a process of its own. Progress goes to standard
error. Importing this module imports no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from qexp.config.dataclass_io import to_plain
from qexp.config.plugins import plugin_module, plugin_names
from qexp.doctor.options import trials
from qexp.doctor.processes import probe
from qexp.errors import ConfigError, QexpError
from qexp.results.environment import RESULT_PACKAGES, cpu_name, device_name, versions_of
from qexp.system.command_parser import CommandParser
from qexp.system.devices import cuda_device_count
from qexp.system.program_name import program_name
from qexp.system.standard_streams import survive_closed_pipes

WIDTH = 120
STATUSES = """\
status of an option on a device
  runs    its layer was quantized, computed the same as its dequantized weight, and has the planned size
  needs   a library, or another machine: see the line below the table
  fails   an error, a crash (signal, exit) or a timeout: see below the table

The exit code is 0 if the table was printed, whatever it contains."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor.

    Return the exit code: 0 with a table, 1 with one line that says why there is none, 130 for Ctrl-C.
    """
    options = _doctor_parser().parse(arguments)
    try:
        if not options.timeout > 0:
            raise ConfigError(f"--timeout {options.timeout:g} must be above 0 seconds; leave it out for 120")
        machine = describe_machine()
        rows = list(rows_of(options.option, options.timeout))
    except QexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the probe has been ended
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps({"machine": machine, "rows": rows}, indent=2) if options.json else format_text(machine, rows))
    return 0


def describe_machine() -> dict[str, Any]:
    """Return the header: versions, processor, memory and devices, without importing torch."""
    quantizers = [plugin_module("backend", name).Quantizer for name in plugin_names("backend")]
    libraries = [package for quantizer in quantizers for package in quantizer.required_packages]
    versions = versions_of(dict.fromkeys((*RESULT_PACKAGES, *libraries)))
    devices = ["cpu", *(f"cuda:{index}" for index in range(cuda_device_count()))]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": versions.pop("torch"),
        "versions": versions,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        "devices": {device: device_name(device) for device in devices},
    }


def rows_of(names: list[str], timeout: float) -> Iterator[dict[str, Any]]:
    """Yield a row per option and device, backend by backend."""
    by_backend: dict[str, list[dict[str, Any]]] = {}
    for name, config in trials(names).items():
        by_backend.setdefault(config.quant_method, []).append({"option": name, "config": to_plain(config)})
    for device in ["cpu", "cuda:0"] if cuda_device_count() else ["cpu"]:
        for backend, of_backend in by_backend.items():
            labels = iter(of_backend)
            print(f"{backend} on {device}: {len(of_backend)} types ...", file=sys.stderr, flush=True)
            for result in probe(of_backend, device, timeout):
                label = next(labels)["config"]["label"]
                yield {"option": result.pop("option"), "backend": backend, "label": label, "device": device, **result}


def format_text(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Format the header, the table, and a paragraph for each row that does not run."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    head = [
        f"python {machine['python']}, torch {machine['torch'] or 'not installed'}, {machine['platform']}",
        *textwrap.wrap(versions, WIDTH, break_on_hyphens=False),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "devices: " + ", ".join(f"{device} ({name})" for device, name in machine["devices"].items()),
    ]
    cells = [_cells(row) for row in rows]
    table = [("option", "backend", "label", "device", "status", "bits/weight", "SQNR dB bf16", "fp32"), *cells]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [_format_line(line, widths) for line in table]
    lines.insert(1, "  ".join("─" * width for width in widths))
    running = sum(row["status"] == "runs" for row in rows)
    return "\n".join([*head, "", *lines, *_reasons(rows), "", f"{running} of {len(rows)} run"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    measured = row["measured"]
    bits = " / ".join(dict.fromkeys(f"{one['bits_per_weight']:.3f}" for one in measured.values()))
    quality = [_quality_cell(measured.get(dtype)) for dtype in ("bfloat16", "float32")]
    return (row["option"], row["backend"], row["label"] or "", row["device"], row["status"], bits, *quality)


def _quality_cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    return "exact" if one["exact"] else "none" if one["sqnr_db"] is None else f"{one['sqnr_db']:.2f}"


def _format_line(words: tuple[str, ...], widths: list[int]) -> str:
    parts = [word.ljust(width) for word, width in zip(words[:5], widths[:5], strict=True)]
    return "  ".join([*parts, *map(str.rjust, words[5:], widths[5:])]).rstrip()


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["status"] != "runs":
            text = f"{row['option']} on {row['device']} {row['status']} ({row['reason']}): {row['message']}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_on_hyphens=False)
    return ["", *lines] if lines else []


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, such as 60") from None


def _doctor_parser() -> CommandParser:
    parser = CommandParser(
        prog=program_name("doctor"),
        description="Try every backend on this machine: what runs, and what the rest needs.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("option", nargs="*", help="options of backend= to try (default: all, and all types)")
    parser.add_argument("--json", action="store_true", help="the same as JSON: machine, and rows with a key for each")
    parser.add_argument(
        "--timeout", type=_seconds, default=120, metavar="SECONDS", help="for one option on one device (default: 120)"
    )
    return parser


if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
