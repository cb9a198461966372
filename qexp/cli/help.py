"""Build the text of `python -m qexp --help` from the comments in conf/, without importing Hydra."""

from __future__ import annotations

from qexp.config.yaml_options import default_options, description, group_names, option_files, top_level_settings

USAGE = """\
qexp: which quantization keeps the quality of a model, at what memory and what speed?

  python -m qexp [group=option ...] [field=value ...]         one experiment
  python -m qexp -m [group=option,option ...] [field=a,b ...] a sweep over all combinations

Examples
  python -m qexp                                              the embedded digits model in nf4, W&B offline
  python -m qexp backend=torchao offload=leaf -m              a sweep, here of one
  python -m qexp -m backend=none,bitsandbytes,torchao,quanto offload=none,leaf,block offload.to=disk
  python -m qexp task=roundtrip backend=torchao backend.quant_type=float8wo_e4m3
  python -m qexp -m backend=bitsandbytes_int8 backend.llm_int8_threshold=0,4,6,8
  python -m qexp experiment=backend_pareto                    a prepared sweep
  python -m qexp -m backend=none,quanto sweep.dry_run=true    what it would run, and what that takes

Commands (the console script `qexp` is the same: qexp report)
  python -m qexp report [sweep …]                             table, plots and report of sweeps and runs
  python -m qexp doctor                                       what runs on this machine, and what the rest needs
  python -m qexp predict [model ...] [memory=16GiB]           bytes of a model in each backend, and whether they fit
  python -m qexp fit model=digits bits=4.5                    the best model that fits: a format for each layer, proven
  python -m qexp rerun outputs/runs/<key>                     a stored experiment again, compared with what it gave
  python -m qexp clean                                        what failed or was left over: shows it, asks, removes it
  each has --help of its own"""

MORE = """\
More
  python -m qexp backend=torchao --cfg job                    the composed configuration: every field and its value
  python -m qexp backend=torchao --cfg job --package backend  the fields of one group
  python -m qexp --config-dir <folder> backend=<name>         options of your own, from <folder>/backend/<name>.yaml
  python -m qexp --version                                    the version of this program
  eval "$(qexp -sc install=bash)"                             completion with the Tab key; install=zsh or fish, too
  python -m qexp --hydra-help                                 flags of Hydra; HYDRA_FULL_ERROR=1 shows tracebacks"""


def help_text() -> str:
    settings = "\n".join(f"  {line}".rstrip() for line in top_level_settings().splitlines())
    parts = [USAGE, _groups(), f"Settings at the top, with their defaults\n{settings}", MORE]
    return "\n\n".join(parts)


def _groups() -> str:
    """List every group with its options and their descriptions; a * marks the default."""
    defaults = default_options()
    lines = ["Groups and their options (* is the default)"]
    for group in group_names():
        for number, path in enumerate(option_files(group)):
            mark = "*" if defaults.get(group) == path.stem else " "
            lines.append(f"  {group if number == 0 else '':11}{mark} {path.stem:22} {description(path)}")
    return "\n".join(lines)
