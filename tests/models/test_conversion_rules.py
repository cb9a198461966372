"""transformers' rules that compute, recorded on headers, against the rules themselves on the tensors."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.conversion import converted
from qexp.models.transformers_networks import Target, computed
from tests.checkpoints.test_conversion import read
from tests.loading.toys import save_state
from tests.quantizers.test_contract import gaussian


class Model:
    """What rules ask of a model: a config, and the shapes of its parameters."""

    config = SimpleNamespace(num_attention_heads=2)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty({"l.a": (4, 6), "l.b": (8, 6), "l.moe": (3, 6, 8)}[name])


EXPERTS = [f"l.{n}.{part}" for part in ("gate", "up") for n in range(4)]
# sources of the rule, its targets, its operations (of `transformers.core_model_loading`, which is the argument), the
# tensors by the patterns that find them
RULES: dict[str, tuple[Any, Any, Callable[[Any], list[Any]], dict[str, list[str]], tuple[int, ...]]] = {
    "merge and join": (
        ["*.gate", "*.up"], "gate_up", lambda lib: [lib.MergeModulelist(0), lib.Concatenate(1)],
        {"*.gate": EXPERTS[:4], "*.up": EXPERTS[4:]}, (4, 6),
    ),
    "merge": ("*.down", "down", lambda lib: [lib.MergeModulelist(0)], {"*.down": ["l.0.down", "l.1.down"]}, (4, 6)),
    "chunk": ("qkv", ["q", "k", "v"], lambda lib: [lib.Chunk(0)], {"qkv": ["l.qkv"]}, (12, 6)),
    "chunk and permute": (
        "qkv", ["q_proj", "k_proj", "v_proj"],
        lambda lib: [lib.Chunk(0), lib.PermuteForRope(permute_layer_names=["q_proj", "k_proj"])],
        {"qkv": ["l.qkv"]}, (24, 6),
    ),
    "split": ("ab", ["a", "b"], lambda lib: [lib.Split(0)], {"ab": ["l.ab"]}, (12, 6)),
    "interleave and chunk": (
        "w13", ["gate", "up"], lambda lib: [lib.Interleave(dim=1), lib.Chunk(dim=1)], {"w13": ["l.w13"]}, (3, 8, 6),
    ),
    "transpose": ("moe_", "moe", lambda lib: [lib.Transpose(1, 2, check_dims=True)], {"moe_": ["l.moe_"]}, (3, 8, 6)),
    "left as it is": (
        "moe_", "moe", lambda lib: [lib.Transpose(1, 2, check_dims=True)], {"moe_": ["l.moe_"]}, (3, 6, 8),
    ),
    "apart": ("all", "*.one", lambda lib: [lib.SplitModulelist(0)], {"all": ["l.all"]}, (3, 4, 6)),
    "text and vision": (
        ["*.gate", "*.up"], ["text", "vision"], lambda lib: [lib.ErnieFuseAndSplitTextVisionExperts()],
        {"*.gate": EXPERTS[:4], "*.up": EXPERTS[4:]}, (4, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_recorded_it_is_what_the_rule_does(case: str, tmp_path: Path) -> None:
    from transformers import core_model_loading

    sources, targets, operations, found, shape = RULES[case]
    names = [name for several in found.values() for name in several]
    state = {name: gaussian(*shape, seed=number) for number, name in enumerate(names)}
    model = Model()
    rule = core_model_loading.WeightConverter(sources, targets, operations=operations(core_model_loading))
    first = targets if isinstance(targets, str) else targets[0]
    name = "l." + first
    for pattern, several in found.items():
        for one in several:
            rule.add_tensor(name, one, pattern, state[one])  # type: ignore[arg-type]
    expected = {key: (v[0] if isinstance(v, list) else v) for key, v in rule.convert(name, model, model.config).items()}

    def conversion(tensors: Any) -> dict[str, Any]:
        lazily = {pattern: [tensors.pop(one) for one in several] for pattern, several in found.items()}
        return computed(model, Target(name, rule, found), lazily)

    recorded = read(converted(open_checkpoint(save_state(tmp_path, state)), conversion))
    assert recorded.keys() == expected.keys() and len(expected) >= 1
    for key, tensor in expected.items():
        assert torch.equal(recorded[key], tensor), key
