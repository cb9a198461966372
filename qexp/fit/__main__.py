"""Find the best model that fits: a format for each layer, within a budget, proven beside every uniform format.

    python -m qexp.fit model=digits bits=4.5
    python -m qexp.fit model=flux_dev memory=16GiB task.prompt='[A red cube]'
    python -m qexp.fit model=arithmetic task=perplexity weights=1MiB formats='[gguf_q4_0,packed_uint3,torchao]'
    python -m qexp.fit flux_dev memory=12GiB step_ms=4000 bandwidth=20GB/s scores=<folder> --plan

Words with = are the overrides of an experiment, but for these:

    memory=6GiB       what the device holds at most: weights, slots, and the larger of loading and activations
    weights=4GiB      bytes of all weights at most
    bits=4.5          bits of a weight at most, over the layers that formats are chosen for
    quality='psnr_db>=40'   the smallest model that reaches it
    step_ms=80        with memory=: time of a step at most; layers may then rest off the device and travel
    bandwidth=20GB/s  bytes that travel in a second (default: measured)
    activations=2GiB  what running takes beside the weights (default: measured by the proof)
    scores=<folder>   a finished run of task=sensitivity (default: the latest one of this model, else a new one)
    formats=[…]       candidates: options of backend=, or {backend: gguf, quant_type: Q5_1} (default: those with scores)
    score=gradient, groups=[…]   task.score and task.groups of a new sensitivity run
    seeds=3           of the proof, none of which scores were made with
    save.path=<folder>   also save the recommended model, whose files must keep weights= or bits= too

--plan stops before a weight is read: the mix, its predicted error and bytes, the front over 20 budgets.
The recipe, tables and plots are written below outputs/fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qexp.fit.command import run_fit
from qexp.fit.request import read_request
from qexp.system.command_parser import CommandParser
from qexp.system.program_name import program_name
from qexp.system.standard_streams import survive_closed_pipes


def _fit_parser(program: str | None = None) -> CommandParser:
    parser = CommandParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="model | key=value", help="overrides, and the words above")
    parser.add_argument("--plan", action="store_true", help="choose, and prove nothing: no weight is read")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 with a recommendation, 1 with one line that says why there is none."""
    options = _fit_parser(program_name("fit")).parse(arguments)
    try:
        run_fit(read_request(options.words), is_plan=options.plan)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        from qexp.cli.hydra_errors import print_error

        print_error(error, options.words)
        return 1
    return 0


if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
