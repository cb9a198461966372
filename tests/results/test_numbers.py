import pytest

from qexp.metrics.registry import all_metrics
from qexp.results.numbers import format_memory, format_number, shown_unit

MIB, KIB = 2**-10, 2**-20  # in GiB


@pytest.mark.parametrize(
    ("values", "unit", "factor"),
    [
        ([1.5 * KIB, 900 * KIB], "KiB", 2**20),
        ([2.7 * MIB, 9.6 * MIB, 1.4 * MIB], "MiB", 2**10),
        ([6.24, 22.2], "GiB", 1),
        ([0.0, 0.0, 3 * MIB, None], "MiB", 2**10),  # zeros say nothing about the size
        ([3 * MIB, 20.0, 40.0], "GiB", 1),
        ([0.0], "GiB", 1),
        ([0.25 * KIB], "KiB", 2**20),
    ],
)
def test_a_column_of_memory_has_the_unit_of_its_middle(values: list[float | None], unit: str, factor: int) -> None:
    assert shown_unit(all_metrics()["memory/weights_gib"], values) == (unit, factor)


def test_other_units_stay() -> None:
    assert shown_unit(all_metrics()["time/step_ms"], [1e-9]) == ("ms", 1)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(2.719, ".2f", "2.72"), (0.0, ".2f", "0.00"), (0.0004, ".2f", "0.0004"), (-0.001, ".1f", "-0.001"),
     (0.5, ".1%", "50.0%"), (1.234e-9, ".2e", "1.23e-09"), (0.00012, ".3f", "0.00012")],
)  # fmt: skip
def test_no_number_but_zero_is_shown_as_zero(value: float, digits: str, text: str) -> None:
    assert format_number(value, digits) == text


@pytest.mark.parametrize(
    ("gib", "text"), [(2.7 * MIB, "2.7 MiB"), (22.17, "22.2 GiB"), (300 * KIB, "300.0 KiB"), (0, "0.0 KiB")]
)
def test_one_size_has_its_own_unit(gib: float, text: str) -> None:
    assert format_memory(gib) == text
