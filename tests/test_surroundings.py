"""conftest.py keeps its promises: without them other tests could pass for the wrong reason."""

import importlib.util
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import NOWHERE, is_loopback

DOCUMENTATION_ADDRESS = "192.0.2.1"  # RFC 5737: routed nowhere, so that a broken guard fails slowly but harmlessly


def test_only_loopback_can_be_reached() -> None:
    with pytest.raises(RuntimeError, match="tests are offline"), socket.socket() as client:
        client.settimeout(1)
        client.connect((DOCUMENTATION_ADDRESS, 80))
    for send in (
        lambda client: client.sendto(b"", (DOCUMENTATION_ADDRESS, 80)),
        lambda client: client.sendmsg([b""], [], 0, (DOCUMENTATION_ADDRESS, 80)),
    ):
        with pytest.raises(RuntimeError, match="tests are offline"), socket.socket(type=socket.SOCK_DGRAM) as client:
            send(client)
    with pytest.raises(RuntimeError, match="tests are offline"):
        socket.getaddrinfo("name.invalid", 443)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2]) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), (b"localhost", True), (None, True), ("10.0.0.1", False), ("name", False)],
)
def test_is_loopback(host: str | bytes | None, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_child_processes_are_sent_to_a_closed_port() -> None:
    code = f"import urllib.request; urllib.request.urlopen('http://{DOCUMENTATION_ADDRESS}', timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "Connection refused" in child.stderr
    assert urllib.request.getproxies()["https"] == urllib.request.getproxies()["http"] == NOWHERE
    assert urllib.request.proxy_bypass("127.0.0.1")


def test_torch_computes_with_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1


def test_hub_kernels_cannot_be_imported() -> None:
    assert sys.modules["kernels"] is None  # what makes `import kernels` fail, installed or not
    assert importlib.util.find_spec("kernels") is None


def test_outputs_is_an_empty_folder_elsewhere(outputs: Path) -> None:
    assert list(outputs.iterdir()) == []
    assert not outputs.is_relative_to(Path(__file__).parents[1])
