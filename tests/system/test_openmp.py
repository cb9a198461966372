import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.system import openmp
from qexp.system.openmp import WAITING, openmp_variables


@pytest.fixture(autouse=True)
def _without_quota(monkeypatch) -> None:
    monkeypatch.setattr(openmp, "usable_threads", lambda: 8)
    monkeypatch.setattr(openmp, "bound_cores", lambda: 8)


def test_a_container_with_a_quota_gets_no_more_threads_than_that(monkeypatch) -> None:
    assert openmp_variables({}) == WAITING
    monkeypatch.setattr(openmp, "usable_threads", lambda: 3)
    assert openmp_variables({}) == {**WAITING, "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_users_number_of_threads_stays(name: str, monkeypatch) -> None:
    monkeypatch.setattr(openmp, "usable_threads", lambda: 3)
    assert openmp_variables({name: "5"}) == WAITING


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_users_choice_of_waiting_stays(name: str) -> None:
    assert openmp_variables({name: "1", "PATH": ""}) == {}
    assert openmp_variables({"OMP_NUM_THREADS": "2"}) == WAITING


def shown_settings(environment: dict[str, str]) -> str:
    """What PyTorch's runtime says of itself when it is loaded."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    library = next(Path(spec.origin).parent.joinpath("lib").glob("libgomp*"), None)
    if library is None:
        pytest.skip("this PyTorch has another OpenMP runtime than GNU's")
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"]
    environment = {"PATH": os.environ["PATH"], "OMP_DISPLAY_ENV": "VERBOSE", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


def test_threads_of_torchs_runtime_spin_for_a_moment_with_these_variables() -> None:
    assert "GOMP_SPINCOUNT = '10000'" in shown_settings(openmp_variables({}))
    assert "GOMP_SPINCOUNT = '10000'" not in shown_settings({})
