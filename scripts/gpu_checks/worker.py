"""The process that checks. Reads its task as JSON from standard input, and answers with a line of JSON for every event.

Answers: {"facts": …}, {"begin": name}, {"row": …}, {"speed": …}, {"end": true}. What libraries print goes to standard
error. An exit with `LOST` means that the device answers no more: another process has to go on after the last row.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOST = 75  # exit status
SPEED_SHARE = 0.35  # of the time, at most, for the rounds of `speed`
GROUPS = ("loading", "speed", "offload")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    task = json.loads(sys.stdin.readline())
    if task["setup"]:
        module, _, function = task["setup"].partition(":")
        getattr(importlib.import_module(module), function)()
    from gpu_checks.checks import DeviceLost

    try:
        check(task, say)
    except DeviceLost:
        sys.exit(LOST)
    say({"end": True})


def check(task: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    import torch

    from gpu_checks import loading, offloading, speed, subjects
    from gpu_checks.accelerator import Accelerator
    from gpu_checks.checks import Checks
    from qexp.config.yaml_options import option_names

    accelerator, small = Accelerator(task["device"]), bool(task["small"])
    dtype = torch.bfloat16 if accelerator.device.type in ("cuda", "cpu") else torch.float32
    say({"facts": {**accelerator.facts(), "dtype": str(dtype).removeprefix("torch.")}})
    checks = Checks(
        lambda name: say({"begin": name}),
        lambda row: say({"row": row.to_dict()}),
        deadline=time.monotonic() + task["seconds"],
        done=task["done"],
        device_works=accelerator.works,
    )
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=task["folder"]) as name:
        folder = Path(name)
        subjects.save_net(folder / "net", 64 if small else 512, 3 if small else 4)
        if "speed" in task["groups"] and not any(done.startswith(f"{speed.TARGETS}: ") for done in task["done"]):
            seconds, failed = SPEED_SHARE * task["seconds"], task["failed"]
            table, rows = speed.check_all(
                checks, accelerator, small=small, gib=task["gib"], dtype=dtype, seconds=seconds, failed=failed
            )
            say({"speed": table})
            for row in rows:
                say({"row": row.to_dict()})
            accelerator.settle()
        options = task["backends"] or option_names("backend")
        if "loading" in task["groups"]:
            subjects.save_net(folder / "large", 64 if small else 1024, 3 if small else 64)  # 1 GiB
            loading.check_all(checks, accelerator, folder, options, dtype=dtype)
        if "offload" in task["groups"]:
            offloading.check_all(checks, accelerator, folder, options, small=small, dtype=dtype)


if __name__ == "__main__":
    main()
