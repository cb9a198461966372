"""Device maps: which device each part of a model goes to."""

from __future__ import annotations

import pytest
import torch

from qexp.errors import ConfigError
from qexp.loading.placement import DeviceMap, one_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("device_map", [None, "cpu", CPU, {"": "cpu"}, {"": CPU}])
def test_one_device(device_map: DeviceMap) -> None:
    assert one_device(device_map, CPU) == CPU


def test_an_index_is_of_the_kind_of_the_device() -> None:
    assert one_device({"": 1}, torch.device("cuda", 0)) == torch.device("cuda", 1)
    assert one_device(0, CPU) == torch.device("cuda", 0)


def test_a_map_over_several_devices() -> None:
    with pytest.raises(ConfigError, match="spreads a model over several devices"):
        one_device({"a": "cpu", "b": "cpu"}, CPU)
