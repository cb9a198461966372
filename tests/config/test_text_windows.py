"""Windows that cannot be right are refused from config.json and the settings alone, before a network is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from qexp.config.text_windows import positions, window_and_stride
from qexp.errors import ConfigError
from qexp.models.causal_lm import CausalLMConfig, Source
from qexp.tasks.perplexity import PerplexityConfig


@pytest.mark.parametrize(
    ("longest", "window", "stride", "has_begin", "sizes"),
    [
        (None, None, None, False, (2048, 1024)),
        (100, None, None, False, (100, 50)),
        (100, None, None, True, (99, 49)),
        (100, 64, 64, False, (64, 64)),
        (4096, 64, 63, True, (63, 63)),
        (100, 2, None, True, (1, 1)),
    ],
)
def test_window_and_stride_have_their_defaults(
    longest: int | None, window: int | None, stride: int | None, has_begin: bool, sizes: tuple[int, int]
) -> None:
    assert window_and_stride(longest, window, stride, has_begin=has_begin) == sizes


@pytest.mark.parametrize(
    ("window", "stride", "words"),
    [(4, 5, "at most 4, with task.window=4"), (64, 100, "at most 64"), (2, 2048, "task.stride=2048 leaves tokens out")],
)
def test_stride_past_the_window_is_refused_as_a_setting(window: int, stride: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PerplexityConfig(window=window, stride=stride)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"n_positions": 128}, 128),
        ({"text_config": {"max_position_embeddings": 128}, "max_position_embeddings": 7}, 128),
        ({"hidden_size": 64}, None),
        ({"max_position_embeddings": -1}, None),
    ],
)
def test_positions_are_those_of_the_text_model(config: dict[str, Any], longest: int | None) -> None:
    assert positions(config) == longest


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 129}, "task.window=129 is more than the 128 positions"),
        ({"window": 100_000, "stride": 1}, "use at most 128, or null"),
        ({"stride": 129}, "task.stride=129 leaves tokens out: it must be at most 128"),
    ],
)
def test_window_past_the_models_positions_is_refused_without_a_network(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    (tmp_path / "text.txt").write_text("one two three")
    task = PerplexityConfig(text=str(tmp_path / "text.txt"), **settings)
    with pytest.raises(ConfigError, match=words):
        Source(CausalLMConfig(path=str(tmp_path))).check_task(task)
