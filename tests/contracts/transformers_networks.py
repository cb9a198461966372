"""Language models of transformers, small: families of encoders, decoders, and both, at most 200 thousand parameters."""

from typing import Any

# What most configs call their sizes. A config gets those that it has.
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "decoder_start_token_id": 0, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "ffn_dim": 64, "embedding_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "type_vocab_size": 2,
}  # fmt: skip


def arguments_for(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The common sizes that a config's class has, and changes. config: one with the defaults of the class."""
    names = {*vars(config), *getattr(config, "attribute_map", {})}
    return {**{name: value for name, value in COMMON.items() if name in names}, **changes}
