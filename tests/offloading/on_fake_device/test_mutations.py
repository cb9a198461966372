"""Tests of the tests: each bug that offloading is known for, put in, must fail the check that the matrix makes."""

from collections.abc import Callable
from typing import Any

import pytest

from qexp.config.offload import OffloadConfig
from qexp.offloading import strategies
from qexp.offloading.engine import Engine
from qexp.offloading.group import Group
from qexp.offloading.payload import Site, sites
from qexp.offloading.streams import Streams
from tests.offloading.on_fake_device.harness import compare, problems
from tests.products import representatives

Break = Callable[[pytest.MonkeyPatch], Any]
BLOCK = OffloadConfig("block", "cpu")
KINDS = ["fp32", "bitsandbytes_nf4_nested", "torchao_int8wo", "quanto_int4", "gguf_q8_0"]


def payload_left_behind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Somebody keeps the tensors that were on the device."""
    kept: list[Any] = []
    pack = Group.pack

    def keep(group: Group, make_rest: Any) -> None:
        kept.extend(store[name] for store, name in group.all_sites)
        pack(group, make_rest)

    monkeypatch.setattr(Group, "pack", keep)
    return kept


def inner_tensor_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest inner tensor of a group stays where the group rests; its scales travel."""
    bindings = Group.bindings

    def leave_one(group: Group, flat: Any, *, frozen: bool = False) -> Any:
        if flat is not group.rest.flat:
            largest = max(group.places, key=lambda place: place.nbytes)
            stays: Any = type("Stays", (), {"view": lambda self, _: largest.view(group.rest.flat)})()
            places, group.places = group.places, [stays if p is largest else p for p in group.places]
            try:
                return bindings(group, flat, frozen=frozen)
            finally:
                group.places = places
        return bindings(group, flat, frozen=frozen)

    monkeypatch.setattr(Group, "bindings", leave_one)


def no_wait_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "compute_waits_for", lambda self, event: None)


def slot_reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "copy_waits_for", lambda self, event: None)


def forgotten_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer outside the groups stays on the host."""

    def parameters_only(module: Any) -> list[Site]:
        return [(store, name) for store, name in sites(module) if store is not module._buffers]

    monkeypatch.setattr(strategies, "sites", parameters_only)


def weights_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group's bytes go back to where they rest, as if they had changed."""
    leave = Engine.leave

    def copy_back(engine: Engine, group: Group, index: int) -> None:
        stay = engine.ring.stay_of(group)
        assert stay is not None
        group.rest.flat.copy_(stay.memory)
        leave(engine, group, index)

    monkeypatch.setattr(Engine, "leave", copy_back)


RAISES = "Expected all tensors to be on the same device"
BUGS: list[tuple[Break, str]] = [
    (payload_left_behind, "nothing but ring and residents on the device"),
    (inner_tensor_left_behind, RAISES),
    (no_wait_for_the_copy, "the output is that of the resident model"),
    (slot_reused_too_early, "no races"),
    (forgotten_buffer, RAISES),
    (weights_copied_back, "no weights copied back"),
]


def cases() -> list[Any]:
    """By default each bug with one kind, every kind once; inner tensors, which kinds have or not, with each of them."""
    return [
        pytest.param(
            bug,
            rule,
            kind,
            id=f"{bug.__name__}-{kind}",
            marks=()
            if bug is inner_tensor_left_behind or kind == KINDS[number % len(KINDS)]
            else pytest.mark.exhaustive,
        )
        for number, (bug, rule) in enumerate(BUGS)
        for kind in KINDS
    ]


@pytest.mark.parametrize(("bug", "rule", "kind"), cases())
def test_the_bug_is_caught(bug: Break, rule: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = bug(monkeypatch)
    if rule == RAISES:
        with pytest.raises((RuntimeError, AssertionError)) as error:
            compare(kind, BLOCK, None, starts_on_device=False)
        assert RAISES in str(error.value) or "quanto" in str(error.traceback[-1].path)  # which looks for itself
    else:
        assert rule in problems(compare(kind, BLOCK, None, starts_on_device=True), BLOCK)
    del kept


@pytest.mark.parametrize("kind", representatives(KINDS, ["fp32", "bitsandbytes_nf4_nested"]))
def test_without_a_bug_nothing_is_found(kind: str) -> None:
    assert problems(compare(kind, BLOCK, None, starts_on_device=True), BLOCK) == []
