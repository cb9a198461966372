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

# Families that the common sizes build as they are.
AS_COMMON = """
AfmoeForCausalLM AlbertForMaskedLM ApertusForCausalLM ArceeForCausalLM BartForConditionalGeneration BertForMaskedLM
BigBirdForMaskedLM BigBirdPegasusForConditionalGeneration BioGptForCausalLM BitNetForCausalLM
BlenderbotForConditionalGeneration BloomForCausalLM Cohere2ForCausalLM CohereForCausalLM ConvBertForMaskedLM
Data2VecTextForMaskedLM DebertaV2ForMaskedLM DeepseekV2ForCausalLM DiffLlamaForCausalLM DogeForCausalLM
ElectraForMaskedLM Ernie4_5_MoeForCausalLM ErnieForMaskedLM EsmForMaskedLM EuroBertForMaskedLM Exaone4ForCausalLM
FalconForCausalLM FalconMambaForCausalLM FlaubertWithLMHeadModel GPT2LMHeadModel
GPTBigCodeForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM GemmaForCausalLM Glm4ForCausalLM
GlmForCausalLM GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GteForMaskedLM HeliumForCausalLM
HunYuanMoEV1ForCausalLM JetMoeForCausalLM LagunaForCausalLM Lfm2ForCausalLM Llama4ForCausalLM LlamaForCausalLM
LongT5ForConditionalGeneration LongformerForMaskedLM M2M100ForConditionalGeneration MBartForConditionalGeneration
MPNetForMaskedLM MT5ForConditionalGeneration MambaForCausalLM MarianMTModel MegatronBertForMaskedLM MiniCPM3ForCausalLM
MiniMaxForCausalLM MinistralForCausalLM MistralForCausalLM MixtralForCausalLM ModernBertForMaskedLM MptForCausalLM
NanoChatForCausalLM NemotronForCausalLM NllbMoeForConditionalGeneration NomicBertForMaskedLM OPTForCausalLM
Olmo2ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM OpenAIGPTLMHeadModel
PegasusForConditionalGeneration PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM PhimoeForCausalLM Qwen2ForCausalLM
Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM RoFormerForMaskedLM RobertaForMaskedLM RwkvForCausalLM
SeamlessM4TForTextToText SmolLM3ForCausalLM SqueezeBertForMaskedLM StableLmForCausalLM Starcoder2ForCausalLM
T5ForConditionalGeneration UMT5ForConditionalGeneration VaultGemmaForCausalLM XGLMForCausalLM XLMRobertaForMaskedLM
"""
CHANGED: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "CTRLLMHeadModel": {"dff": 64},
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "DistilBertForMaskedLM": {"dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "FlexOlmoForCausalLM": {"num_experts_per_tok": 4},
    "FSMTForConditionalGeneration": {"src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"]},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Glm4MoeLiteForCausalLM": {"num_key_value_heads": 4},
    "JambaForCausalLM": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "LEDForConditionalGeneration": {
        "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4,
    },
    "Lfm2MoeForCausalLM": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "SwitchTransformersForConditionalGeneration": {
        "num_layers": 1, "num_decoder_layers": 1, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "num_experts": 1,
    },
}  # fmt: skip
NETWORKS = {**{name: {} for name in AS_COMMON.split()}, **CHANGED}


def arguments_for(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The common sizes that a config's class has, and changes. config: one with the defaults of the class."""
    names = {*vars(config), *getattr(config, "attribute_map", {})}
    return {**{name: value for name, value in COMMON.items() if name in names}, **changes}


def build(name: str) -> Any:
    """A network with weights that differ from all of its initial values, those of norms and biases too."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**arguments_for(kind.config_class(), NETWORKS[name])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # 64 columns of 0.1: what goes through keeps its size
    return model
