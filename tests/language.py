"""A tiny language model of characters in a folder, for tests of several rooms."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.models.arithmetic import ASSETS

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEXT = "543+870=3240\n543-870=7620\n000+000=0000\n999+999=8991\n100-100=0000\n"  # 65 characters


def save_language_model(folder: Path, positions: int = 64, **changes: Any) -> Path:
    """A Llama with random weights and the embedded model's tokenizer."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=5
    )
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(ASSETS / name, folder / name)
    return folder
