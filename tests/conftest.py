"""What holds in every test: one thread, no network, nobody's account, cache or environment variables.

All of it is environment, set before any test module is imported and inherited by the processes that tests start, so
that nothing here needs torch and tests that do without stay fast.
"""

import gc
import ipaddress
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import own_process

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # sums in the same order on every machine, and processes do not fight over cores
    "MKL_NUM_THREADS": "1",
    "CI": os.environ.get("CI", "1"),  # plain output
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",  # also keeps bitsandbytes' import, on CPUs with AVX512-BF16, from asking a hub for kernels
    "WANDB_MODE": "disabled",  # an explicit `mode=` wins over it
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "NETRC": os.devnull,
    "HTTP_PROXY": NOWHERE,  # stops child processes, which the guard below cannot see
    "HTTPS_PROXY": NOWHERE,
    "http_proxy": NOWHERE,
    "https_proxy": NOWHERE,
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


ON_FAKE_DEVICE = "test_on_the_fake_device"
LONG_FILES = ("test_on_fake_device.py", "test_bench_load.py", "test_bench_offload.py", "test_gpu_check.py")


class NetworkError(RuntimeError):
    """Deliberately no OSError, which libraries catch and retry."""


def refuse_network(patch: pytest.MonkeyPatch) -> None:
    """Let only loopback and Unix sockets be reached. An audit hook would see the same, but costs 2 % of all tests."""

    def guard(owner: Any, name: str, address_of: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def guarded(*arguments: Any, **fields: Any) -> Any:
            address = address_of(*arguments, **fields)
            if isinstance(address, tuple) and not is_loopback(address[0]):
                raise NetworkError(f"{name} to {address[0]!r}: tests are offline; use a fake, or a server on 127.0.0.1")
            return original(*arguments, **fields)

        patch.setattr(owner, name, guarded)

    for name in ("connect", "connect_ex", "sendto"):
        guard(socket.socket, name, lambda *arguments: arguments[-1])
    guard(socket.socket, "sendmsg", lambda *arguments: arguments[4] if len(arguments) > 4 else None)
    guard(socket, "getaddrinfo", lambda host, port, *_, **__: (host, port))


def is_loopback(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:  # a name that would have to be looked up
        return False


def pytest_configure(config: pytest.Config) -> None:
    home = tempfile.TemporaryDirectory(prefix="qexp-tests-")
    config.add_cleanup(home.cleanup)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HF_", "HYDRA_", "QEXP_"))]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    for name in ("HF_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_DIR"):
        os.environ[name] = home.name
    # Child processes import the checkout under test, wherever they run.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.modules["kernels"] = None  # type: ignore[assignment]  # not even from a cache: a hub's kernels are not what we test
    gc.set_threshold(20_000, 20, 20)  # a tenth of all CPU time went into looking for cycles among what libraries made
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    refuse_network(patch)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, which share what they load; those that only wait for a process of
    their own are spread. Long files begin first, or one process would still be busy when the others have ended."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if ON_FAKE_DEVICE in nodeid else str(super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # by number of tests; pytest_collection_modifyitems has the order
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(LONG_FILES))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, what an external test needs has been installed: that it is skipped is a failure of the set-up."""
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")  # pytest calls expected failures skipped, too
    if os.environ["CI"] == "true" and is_skip and item.get_closest_marker("external"):
        report.outcome = "failed"
        report.longrepr = f"an external test was skipped in CI: {reason_of(report)}"
    return report


def reason_of(report: pytest.TestReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return own_process.run_if_marked(pyfuncitem) or None


@pytest.fixture(scope="module", autouse=True)
def light_heap() -> None:
    """Leave what libraries have imported out of garbage collections: each would take a second more."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """An empty folder for `paths.outputs`."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline of diffusers, which is made once for all tests: they must leave it as it is."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        from tests.pipelines import save_pipeline

        if name not in made:
            made[name] = save_pipeline(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What qexp logs meanwhile. pytest's own capture is off (pyproject.toml): it visits every logger of every library
    six times in each test, which cost 2 % of all tests."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("qexp"), logging.getLogger("qexp").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Fail a test behind which a thread still runs."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.fixture
def without_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bitsandbytes' layers keep their bytes: on some CPUs the first forward of its own ones repacks the weight."""
    import bitsandbytes.nn.modules as modules

    from qexp.quantizers.bitsandbytes_support.library import library

    library()  # its fixes are for the whole process: without, answers would depend on which tests ran before
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def open_gate(without_repacking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have diffusers load bitsandbytes' formats on the CPU, which it refuses though the library can."""
    import diffusers.quantizers.bitsandbytes.bnb_quantizer as gated

    for quantizer in (gated.BnB4BitDiffusersQuantizer, gated.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *arguments, **fields: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
