"""The settings of offloading: what is refused and how it says so, and what is settled or dropped for a device."""

from dataclasses import fields
from typing import Any

import pytest

from qexp.config.offload import STRATEGIES, OffloadConfig
from qexp.errors import ConfigError

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"strategy": "leafs"}, "offload.strategy='leafs' is unknown", "use block, leaf, model, none or sequential"),
    ({"to": "gpu"}, "offload.to='gpu' is unknown", "use auto, cpu or disk"),
    ({"num_blocks_per_group": 0}, "offload.num_blocks_per_group=0 must be 1 or more", "use 1, or offload=leaf"),
    ({"num_blocks_per_group": None}, "offload.num_blocks_per_group=null must be 1", "use 1, or offload=leaf"),
    ({"prefetch_depth": 1}, "offload.prefetch_depth=1 must be 2 or more", "offload.use_stream=false"),
    ({"resident_gib": -1.0}, "offload.resident_gib=-1.0 must be a size in GiB", "use offload=none"),
    ({"resident_gib": float("inf")}, "offload.resident_gib=inf must be a size in GiB", "use offload=none"),
    ({"resident_gib": float("nan")}, "offload.resident_gib=nan must be a size in GiB", "use offload=none"),
]
CONFLICTS: list[tuple[dict[str, Any], str, str, str]] = [
    (
        {"use_stream": True, "to": "cpu"},
        "cpu",
        "offload.use_stream=true needs a device with streams, and device=cpu has none",
        "use offload.to=disk, which a thread reads ahead, or offload.use_stream=null",
    ),
    (
        {"use_stream": True},
        "mps",
        "needs a device with streams, and device=mps has none",
        "use offload.use_stream=null",
    ),
    (
        {"use_stream": True, "non_blocking": False},
        "cuda",
        "with offload.non_blocking=false makes the host",
        "leave out",
    ),
    ({"record_stream": True}, "cpu", "offload.record_stream=true needs a stream, and device=cpu has none", "leave it"),
    ({"record_stream": True, "use_stream": False}, "cuda", "needs a stream, and offload uses none here", "leave it"),
    (
        {"record_stream": True, "non_blocking": False},
        "cuda",
        "needs a stream, and offload uses none",
        "use_stream=true",
    ),
]
EVERYTHING: dict[str, Any] = {
    "num_blocks_per_group": 3, "prefetch_depth": 4, "resident_gib": 1.5, "low_cpu_mem": True,
}  # fmt: skip


@pytest.mark.parametrize(("values", "rule", "remedy"), REFUSED, ids=[str(values) for values, *_ in REFUSED])
def test_values_out_of_range_are_refused(values: dict[str, Any], rule: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        OffloadConfig(**values)
    assert rule in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize(("values", "device", "rule", "remedy"), CONFLICTS, ids=[str(row[:2]) for row in CONFLICTS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conflicts_are_refused_where_they_matter(
    values: dict[str, Any], device: str, rule: str, remedy: str, strategy: str
) -> None:
    config = OffloadConfig(strategy, **values)
    if strategy in ("none", "model", "sequential"):  # they use no stream, whatever the fields say
        plain = OffloadConfig(strategy, config.to, non_blocking=config.non_blocking)
        assert config.resolved(device) == plain.resolved(device)
        return
    with pytest.raises(ConfigError) as error:
        config.resolved(device)
    assert rule in str(error.value) and remedy in str(error.value)


KEPT = {  # of EVERYTHING, on a device with streams
    "none": set(),
    "model": {"low_cpu_mem"},
    "sequential": {"low_cpu_mem", "resident_gib"},
    "leaf": {"low_cpu_mem", "resident_gib", "prefetch_depth"},
    "block": {"low_cpu_mem", "resident_gib", "prefetch_depth", "num_blocks_per_group"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fields_that_change_nothing_are_dropped(strategy: str) -> None:
    def kept(device: str, **values: Any) -> set[str]:
        plain = OffloadConfig(strategy, values.get("to", "auto")).resolved(device)
        config = OffloadConfig(strategy, **(EVERYTHING | values)).resolved(device)
        return {item.name for item in fields(config) if getattr(config, item.name) != getattr(plain, item.name)}

    assert kept("cuda") == KEPT[strategy]
    assert kept("cuda", to="disk") == KEPT[strategy] - {"low_cpu_mem"}  # only a staging buffer is pinned anyway
    assert kept("cpu") == KEPT[strategy] - {"low_cpu_mem"}  # a thread reads ahead from disk
    assert kept("cpu", to="cpu") == KEPT[strategy] - {"low_cpu_mem", "prefetch_depth"}
    without = {"use_stream"} if strategy in ("leaf", "block") else set()
    assert kept("cuda", use_stream=False) == (KEPT[strategy] - {"prefetch_depth"}) | without


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "fake"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_settled_stays_settled(strategy: str, device: str) -> None:
    once = OffloadConfig(strategy, **EVERYTHING).resolved(device)
    assert once.resolved(device) == once
    assert once.to == ("auto" if strategy == "none" else "disk" if device == "cpu" else "cpu")
    streams = device != "mps" and strategy in ("leaf", "block")
    assert once.use_stream is (True if streams else None)


def test_blocking_copies_need_no_stream() -> None:
    config = OffloadConfig("leaf", non_blocking=False).resolved("cuda")
    assert (config.use_stream, config.non_blocking) == (False, False)
    config = OffloadConfig("leaf", non_blocking=False).resolved("cpu")
    assert config.use_stream and config.non_blocking  # a thread reads, whatever the field says
