"""Random numbers inside a call: row i of whatever is drawn is what generator i gives for a batch of one."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from qexp.models.pipeline_noise import MixedNoiseError, noise_of_samples

WEIGHTS = torch.tensor([[0.1, 0.9, 3.0], [5.0, 0.2, 0.3], [1.0, 1.0, 1.0]])
DRAWS: dict[str, Callable[[int], Tensor]] = {
    "randn": lambda n: torch.randn(n, 4),
    "randn, a tuple": lambda n: torch.randn((n, 4), dtype=torch.bfloat16),
    "randn, a size": lambda n: torch.randn(size=(n, 2, 2), generator=None),
    "rand": lambda n: torch.rand([n, 4]),
    "randint": lambda n: torch.randint(3, 100, (n, 4)),
    "normal": lambda n: torch.normal(1.0, 2.0, size=(n, 4)),
    "randn_like": lambda n: torch.randn_like(torch.zeros(n, 4), dtype=torch.float64),
    "randint_like": lambda n: torch.randint_like(torch.zeros(n, 4), 50),
    "multinomial": lambda n: torch.multinomial(WEIGHTS[:1].expand(n, 3), 6, replacement=True),
    "bernoulli": lambda n: torch.bernoulli(torch.full((n, 9), 0.5)),
    "normal of means": lambda n: torch.normal(torch.ones(n, 3), 2.0),
    "normal_": lambda n: torch.empty(n, 4).normal_(1, 2),
    "uniform_": lambda n: torch.empty(n, 4).uniform_(0, 1),
    "exponential_": lambda n: torch.empty(n, 4).exponential_(),
}


def generators(*seeds: int) -> list[Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("case", DRAWS)
def test_rows_of_a_draw_are_those_of_each_generator(case: str) -> None:
    draw, rows = DRAWS[case], []
    with noise_of_samples(generators(1, 2, 3)):
        together = [draw(3), draw(3)]
    for seed in (1, 2, 3):
        with noise_of_samples(generators(seed)):
            rows.append([draw(1), draw(1)])
        torch.manual_seed(seed)  # the same stream, from torch's global generator
        assert torch.equal(rows[-1][0], draw(1))
    for number, both in enumerate(together):
        assert torch.equal(both, torch.cat([row[number] for row in rows]))
    assert not torch.equal(together[0], together[1])


def test_draw_with_a_generator_of_its_own_is_left_alone() -> None:
    (own,), (same,) = generators(7), generators(7)
    with noise_of_samples(generators(1, 2)):
        drawn = torch.randn(5, 4, generator=own)
    assert torch.equal(drawn, torch.randn(5, 4, generator=same))


def test_list_of_generators_is_one_a_row() -> None:
    with noise_of_samples(generators(1, 2)):
        drawn = torch.zeros(2, 3).uniform_(0, 1, generator=generators(8, 9))  # type: ignore[arg-type]
    expected = [torch.zeros(1, 3).uniform_(0, 1, generator=generator) for generator in generators(8, 9)]
    assert torch.equal(drawn, torch.cat(expected))


TOGETHER: dict[str, Callable[[], Tensor]] = {
    "a field": lambda: torch.randn(5, 4),
    "a number": lambda: torch.randint(0, 9, []),
    "an order": lambda: torch.randperm(2),
    "one row of weights": lambda: torch.multinomial(WEIGHTS[0], 1),
    "a number in place": lambda: torch.empty(()).normal_(),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_draw_for_all_samples_together_is_an_error(case: str) -> None:
    before = torch.randn, torch.Tensor.normal_
    with pytest.raises(MixedNoiseError, match="for 2 samples together"), noise_of_samples(generators(1, 2)):
        TOGETHER[case]()
    assert (torch.randn, torch.Tensor.normal_) == before
    with noise_of_samples(generators(1)):
        TOGETHER[case]()
