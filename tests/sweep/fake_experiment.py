"""Experiments that end in every way a real one can, for workers that tests start: no torch, no model.

What an experiment does is chosen by `task.num_images`, so that it is part of the configuration that a worker reads;
references behave, unless the seed is BAD_REFERENCE.
"""

import errno
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, LoadError, UnsupportedError
from qexp.system.screen import say
from qexp.system.stages import Stage, show_stage

FAKES = {"experiment": f"{__name__}:run", "score": f"{__name__}:score", "check": f"{__name__}:check"}
BAD_REFERENCE = 7
REFUSED = {
    "heads": ConfigError("skip_modules: 'heads' matches no module"),
    "tails": RuntimeError("a shape is wrong"),
    "exit": SystemExit(3),
}
METRICS = {"memory/weights_gib": 0.25, "time/step_ms": 1.5, "load/seconds": 0.1}


def run(config: RunConfig, folder: Path) -> dict[str, float | None]:
    """Notes that it ran, writes an output, and does what the task says."""
    with Path(config.paths.outputs, "ran.txt").open("a") as stream:
        stream.write(f"{folder.parent.name}/{folder.name}\n")
    backend = config.components["transformer"].backend.quant_method
    if backend != "none" or config.seed == BAD_REFERENCE:
        BEHAVIOURS[config.task.num_images](folder)
    write_outputs(folder, backend)
    (folder / "memory.csv").write_text("step\n")
    return dict(METRICS)


def write_outputs(folder: Path, backend: str) -> None:
    """A safetensors file without a tensor that says whose it is."""
    header = json.dumps({"__metadata__": {"backend": backend}}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outputs.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def check(config: RunConfig, folder: Path) -> None:
    """What is known before weights are read, by the candidate's skip_modules."""
    for pattern in config.components["transformer"].skip_modules:
        if pattern == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if pattern in REFUSED:
            raise REFUSED[pattern]


def run_while_weights_change(config: RunConfig, folder: Path) -> dict[str, float | None]:
    """Somebody puts another fine-tune in the place of the weights while the candidate, or with one seed its reference,
    runs."""
    metrics = run(config, folder)
    if (folder.parent.name == "references") == (config.seed == 1):
        file = Path(config.model.path, "model.safetensors")
        status, content = file.stat(), file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return metrics


def run_while_its_file_is_cut(config: RunConfig, folder: Path) -> dict[str, float | None]:
    file = Path(config.model.path, "model.safetensors")
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    os.truncate(file, 0)
    return {"a/byte": float(mapped[0])}


def run_roundtrip(config: RunConfig, folder: Path) -> dict[str, float | None]:
    return {"roundtrip/sqnr_db_mean": 20.0}


def run_infinite(config: RunConfig, folder: Path) -> dict[str, float | None]:
    return {"a/inf": float("inf"), "a/nan": float("nan"), "a/none": None, "a/one": 1.0}


def run_environment(config: RunConfig, folder: Path) -> dict[str, float | None]:
    (folder / "environment.txt").write_text("".join(f"{name}={value}\n" for name, value in os.environ.items()))
    return {}


def run_where_it_is(config: RunConfig, folder: Path) -> dict[str, float | None]:
    """What a worker has from its process."""
    stdin_is_empty = not sys.stdin.read()
    server = Path(f"/proc/{os.getppid()}/cmdline").read_text()
    return {
        "a/leads_session": float(os.getsid(0) == os.getpid()),
        "a/stdin_is_empty": float(stdin_is_empty),
        "a/forked": float("qexp.sweep.fork_server" in server),
        "a/threads": float(len(os.listdir("/proc/self/task"))),
        "a/in_folder": float(Path.cwd() == Path(config.paths.outputs).parent),
        "a/pid": float(os.getpid()),
        "a/parent": float(os.getppid()),
    }


def count_torch_threads(config: RunConfig, folder: Path) -> dict[str, float | None]:
    import torch

    return {"a/torch_threads": float(torch.get_num_threads())}


def run_killing_the_server_once(config: RunConfig, folder: Path) -> dict[str, float | None]:
    return _kill_the_server(folder, once=True)


def run_killing_the_server(config: RunConfig, folder: Path) -> dict[str, float | None]:
    return _kill_the_server(folder, once=False)


def run_with_a_daemon_killing_the_server_once(config: RunConfig, folder: Path) -> dict[str, float | None]:
    if not (folder.parents[1] / "killed").exists():
        _start_daemon(folder.parents[1])
    return _kill_the_server(folder, once=True)


def _kill_the_server(folder: Path, once: bool) -> dict[str, float | None]:
    """As the kernel's out-of-memory killer may."""
    mark = folder.parents[1] / "killed"
    is_forked = "qexp.sweep.fork_server" in Path(f"/proc/{os.getppid()}/cmdline").read_text()
    if is_forked and not (once and mark.exists()):
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    return {"a/forked": float(is_forked)}


def score(config: RunConfig, folder: Path, reference: Path | None) -> dict[str, float | None]:
    """The number of metrics asked for; needs the outputs of the run and of its reference."""
    assert reference is not None and b'"none"' in (reference / "outputs.safetensors").read_bytes()
    assert (folder / "outputs.safetensors").exists()
    return {f"quality/{name}": float(len(config.metrics.names)) for name in config.metrics.names}


def score_unscorable(config: RunConfig, folder: Path, reference: Path | None) -> dict[str, float | None]:
    raise LoadError("no statistics to compare with")


def _raise(error: BaseException):
    def behaviour(folder: Path) -> None:
        raise error

    return behaviour


def _sleep(folder: Path) -> None:
    (folder / "started").touch()
    time.sleep(600)


def _wait_for_go(folder: Path) -> None:
    (folder / "started").touch()
    while not (folder.parents[1] / "go").exists():
        time.sleep(0.01)


def _sleep_with_children(folder: Path) -> None:
    _start_daemon(folder)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child.pid").write_text(str(child.pid))
    (folder / ".outputs.safetensors.1.tmp").write_text("half")
    (folder / "offload").mkdir()
    (folder / "offload" / "weights").write_text("scratch")
    _sleep(folder)


def _start_daemon(folder: Path) -> None:
    """The grandchild leads a session of its own, and the child has ended."""
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '600'], start_new_session=True)"
    code += "; open(sys.argv[1], 'w').write(str(child.pid))"
    subprocess.run([sys.executable, "-c", code, str(folder / "daemon.pid")], check=True)


def _leave_child(folder: Path) -> None:
    """The child keeps this process's output open."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child.pid").write_text(str(child.pid))


def _print(folder: Path) -> None:
    sys.stdout.buffer.write(b"50 %\r100 %\r\xff\n")
    sys.stdout.flush()
    print("to stderr", file=sys.stderr)
    say("50 %\r100 %\r\u00e4 \u4e2d")


def _show_stages(folder: Path) -> None:
    """As a task shows its steps, each twice as long as a terminal takes to show it."""
    for step in (8, 10):
        line = f"generating step {step}/20, 500 ms a step" if step == 10 else ""
        show_stage(Stage("generating step {}", step, 20, seconds=step / 2, line=line))
        time.sleep(0.5)
    say("said beside the stages")


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


def _allocate_past_a_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    bytearray(2**34)


def _fill_the_disk(folder: Path) -> None:
    with open("/dev/full", "w") as disk:  # the kernel's own: each write is refused
        disk.write("weights")


BEHAVIOURS = {
    1: lambda folder: None,
    2: _raise(RuntimeError("a tensor is wrong\nin two lines")),
    3: _raise(ConfigError("backend.x=1 must be 2")),
    4: _raise(UnsupportedError("needs a GPU")),
    5: _raise(LoadError("checkpoint is truncated")),
    6: _raise(MemoryError()),
    7: _raise(OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
    8: _raise(
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")
    ),
    9: _raise(OSError(errno.ENOSPC, "No space left on device", "weights.bin")),
    10: _raise(PermissionError(errno.EACCES, "Permission denied", "weights.bin")),
    11: lambda folder: sys.exit(3),
    12: lambda folder: os._exit(4),
    13: lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    14: lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
    15: _sleep_with_children,
    16: _sleep,
    17: _leave_child,
    18: _print,
    19: _raise(RuntimeError("I/O error: No space left on device (os error 28)")),
    20: _wait_for_go,
    21: _raise(KeyboardInterrupt()),
    22: _allocate_past_a_limit,
    23: _fill_the_disk,
    24: _show_stages,
}
