"""Arguments that build every denoiser of diffusers small: mostly below 400 thousand parameters (HunyuanVideo15: 4.4 M).

Widths are 64 where a class allows it, so that every format has layers that it can hold.
"""

from typing import Any

HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
WAN = {
    **HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32,
    "ffn_dim": 64, "num_layers": 1,
}  # fmt: skip
COGVIDEOX = {
    **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32, "text_embed_dim": 32, "num_layers": 1,
    "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 8,
}  # fmt: skip
BRIA = {
    **HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64,
    "axes_dims_rope": [4, 4, 8],
}  # fmt: skip
FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
    "num_refiner_layers": 1, "text_embed_dim": 32,
}  # fmt: skip
JOYIMAGE = {
    "in_channels": 4, "hidden_size": 64, "num_attention_heads": 4, "text_dim": 32, "mlp_width_ratio": 2.0,
    "num_layers": 1, "rope_dim_list": [4, 6, 6],
}  # fmt: skip
LTX2 = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32, "num_layers": 1, "caption_channels": 32,
}  # fmt: skip
SANA = {
    "in_channels": 4, "out_channels": 4, **HEADS, "num_layers": 1, "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": 32, "sample_size": 8,
}  # fmt: skip
UNET_3D: dict[str, Any] = {
    "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 32,
    "attention_head_dim": 4,
}  # fmt: skip

NETWORKS: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
    },
    "AllegroTransformer3DModel": {
        **HEADS, "num_layers": 1, "cross_attention_dim": 64, "sample_height": 8, "sample_width": 8, "sample_frames": 4,
        "caption_channels": 32,
    },
    "AnyFlowFARTransformer3DModel": WAN,
    "AnyFlowTransformer3DModel": WAN,
    "AuraFlowTransformer2DModel": {
        "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 16, "joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 16,
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 8, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32,
        "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
        "gist_step": 4, "axes_dims": (4, 6, 6), "axes_lens": (64, 16, 16),
    },
    "BriaFiboTransformer2DModel": {**BRIA, "num_attention_heads": 2, "joint_attention_dim": 32, "text_encoder_dim": 16},
    "BriaTransformer2DModel": {**BRIA, "num_attention_heads": 2},
    "ChromaTransformer2DModel": {
        **FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1,
    },
    "ChronoEditTransformer3DModel": WAN,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "CogView3PlusTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 8,
        "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
        "rope_axes_dim": (8, 8),
    },
    "ConsisIDTransformer3DModel": {
        **COGVIDEOX, "is_train_face": True, "cross_attn_dim_head": 16, "cross_attn_num_heads": 2, "LFE_id_dim": 32,
        "LFE_vit_dim": 32, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2,
        "LFE_num_querie": 4, "LFE_output_dim": 32, "LFE_ff_mult": 1,
    },
    "Cosmos3OmniTransformer": {
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "latent_channel": 4, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "patch_latent_dim": 16, "vocab_size": 64,
        "rope_scaling": {"mrope_section": [4, 2, 2]},
    },
    "CosmosTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, **HEADS, "num_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 32,
        "adaln_lora_dim": 8, "max_size": (4, 8, 8),
    },
    "DiTTransformer2DModel": {**HEADS, "in_channels": 4, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 8},
    "DreamLiteTransformer2DModel": {
        **HEADS, "in_channels": 64, "num_layers": 1, "cross_attention_dim": 32, "use_linear_projection": True,
    },
    "EasyAnimateTransformer3DModel": {
        **HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 8, "sample_height": 8,
        "num_layers": 1, "mmdit_layers": 1, "time_embed_dim": 16, "text_embed_dim": 32,
        "add_noise_in_inpaint_model": True,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 64, "num_attention_heads": 4, "num_layers": 1, "ffn_hidden_size": 64, "in_channels": 8,
        "out_channels": 8, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
    "Flux3Transformer2DModel": {
        **FLUX, "cond_in_channels": 16, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 32,
    },
    "FluxTransformer2DModel": {**FLUX, "pooled_projection_dim": 32, "guidance_embeds": True},
    "GlmImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 16,
    },
    "HeliosTransformer3DModel": {**WAN, "rope_dim": (4, 6, 6)},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "caption_channels": [32, 32], "text_emb_dim": 32, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (8, 8), "max_resolution": (16, 16), "llama_layers": [0, 1],
    },
    "HunyuanDiT2DModel": {
        **HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 64, "num_layers": 2,
        "mlp_ratio": 1.0, "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 32,
        "text_len": 4, "text_len_t5": 4,
    },
    "HunyuanImageTransformer2DModel": {**HUNYUAN, "in_channels": 4, "out_channels": 4, "rope_axes_dim": (8, 8)},
    "HunyuanVideo15Transformer3DModel": {
        **{name: value for name, value in HUNYUAN.items() if name != "num_single_layers"}, "in_channels": 9,
        "out_channels": 4, "text_embed_2_dim": 32, "image_embed_dim": 32, "rope_axes_dim": (4, 6, 6),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        **HUNYUAN, "in_channels": 4, "out_channels": 4, "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6),
        "has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True,
    },
    "HunyuanVideoTransformer3DModel": {
        **HUNYUAN, "in_channels": 4, "out_channels": 4, "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6),
    },
    "Ideogram4Transformer2DModel": {
        "in_channels": 8, "num_layers": 1, **HEADS, "intermediate_size": 64, "adaln_dim": 32, "llm_features_dim": 64,
        "mrope_section": (4, 2, 2),
    },
    "JoyImageEditPlusTransformer3DModel": JOYIMAGE,
    "JoyImageEditTransformer3DModel": JOYIMAGE,
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 32, "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1,
        "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
    },
    "Kandinsky6SRTransformer3DModel": {
        "in_visual_dim": 8, "out_visual_dim": 8, "time_dim": 32, "model_dim": 32, "ff_dim": 64,
        "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
    },
    "Kandinsky6Transformer3DModel": {
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 32,
        "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
        "in_audio_dim": 4, "out_audio_dim": 4,
    },
    "Krea2Transformer2DModel": {
        "in_channels": 16, "num_layers": 1, **HEADS, "num_key_value_heads": 2, "intermediate_size": 64,
        "timestep_embed_dim": 32, "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 64, "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6),
    },
    "LTX2VideoTransformer3DModel": LTX2,
    "LTXVideoTransformer3DModel": {
        "in_channels": 8, "out_channels": 8, **HEADS, "cross_attention_dim": 64, "num_layers": 1,
        "caption_channels": 32,
    },
    "LatteTransformer3DModel": {
        **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 64, "sample_size": 8,
        "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 8, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "caption_channels": 32, "attention_bias": True, "video_length": 2,
    },
    "LongCatAudioDiTTransformer": {
        "dit_dim": 64, "dit_depth": 1, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "ff_mult": 1.0,
    },
    "LongCatImageTransformer2DModel": {**FLUX, "pooled_projection_dim": 32},
    "Lumina2Transformer2DModel": {
        "sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 8, 8),
        "axes_lens": (16, 8, 8), "cap_feat_dim": 32,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 8, "hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
        "multiple_of": 16, "cross_attention_dim": 32,
    },
    "MiniMaxH3Transformer3DModel": {
        **HEADS, "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4,
        "audio_in_channels": 4, "text_dim": 32, "freq_dim": 32, "time_embed_hidden_dim": 32, "time_embed_dim": 32,
        "rope_freq_dim": 2,
    },
    "MiniMaxMusic3Transformer1DModel": {
        "in_channels": 8, "condition_dim": 32, "num_layers": 1, **HEADS, "ff_inner_dim": 64, "rotary_dim": 8,
        "fourier_embedding_dim": 32,
    },
    "MochiTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "pooled_projection_dim": 32,
        "in_channels": 4, "text_embed_dim": 32, "time_embed_dim": 32, "max_sequence_length": 8,
    },
    "MotifVideoTransformer3DModel": {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 1, "text_embed_dim": 32, "rope_axes_dim": (4, 6, 6),
    },
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 4, "num_layers": 5, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), "mlp_ratio": 6.0, "num_experts": 2,
        "moe_intermediate_dim": 32, "capacity_factors": 2.0,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
        "num_layers": 1, "pad_token_id": 0, "vocab_size": 64, "max_position_embeddings": 64,
        "original_max_position_embeddings": 64, "pos_embed_max_size": 16, "time_step_dim": 32,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
    },
    "OvisImageTransformer2DModel": {**FLUX, "out_channels": 16},
    "PRXTransformer2DModel": {
        "in_channels": 4, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 1.0, "num_heads": 4, "depth": 1,
        "axes_dim": [8, 8],
    },
    "PixArtTransformer2DModel": {
        **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 64, "sample_size": 8,
        "use_additional_conditions": False, "caption_channels": 32,
    },
    "PriorTransformer": {**HEADS, "num_layers": 1, "embedding_dim": 32, "num_embeddings": 7},
    "QwenImage21Transformer2DModel": {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, **HEADS, "context_in_dim": 32, "mlp_ratio": 1,
        "axes_dims_rope": (4, 6, 6),
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
    },
    "RFD4ProteinaTransformer": {
        "nlayers": 1, "token_dim": 32, "nheads": 2, "dim_cond": 32, "pair_repr_dim": 32, "latent_dim": 8,
        "token_type_emb_dim": 8, "cath_emb_dim": 8, "t_emb_dim": 32, "seq_sep_dim": 16, "xt_pair_dist_dim": 8,
        "tri_mult_c": 32,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32,
        "pooled_projection_dim": 32, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    "SanaTransformer2DModel": SANA,
    "SanaVideoTransformer3DModel": SANA,
    "SanaWMLTX2RefinerTransformer3DModel": LTX2,
    "SanaWMTransformer3DModel": {
        "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
        "linear_head_dim": 16, "chunk_plucker_channels": 8, "chunk_plucker_post_attn_blocks": 1,
        "caption_channels": 32, "mlp_ratio": 1.0, "image_size": 64,
    },
    "SkyReelsV2Transformer3DModel": {**WAN, "inject_sample_info": True},
    "StableAudio3DiTModel": {
        "io_channels": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "cond_token_dim": 32, "global_cond_dim": 32,
        "local_add_cond_dim": 9, "timestep_features_dim": 32, "ff_mult": 1.0, "num_memory_tokens": 4,
    },
    "StableAudioDiTModel": {
        "sample_size": 16, "in_channels": 8, "num_layers": 1, **HEADS, "num_key_value_attention_heads": 2,
        "out_channels": 8, "cross_attention_dim": 32, "time_proj_dim": 32, "global_states_input_dim": 32,
        "cross_attention_input_dim": 32,
    },
    "StableCascadeUNet": {
        "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 32,
        "block_out_channels": (16, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32,
        "clip_image_in_channels": 32,
    },
    "T5FilmDecoder": {
        "input_dims": 8, "targets_length": 8, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64,
    },
    "Transformer2DModel": {**HEADS, "in_channels": 64, "cross_attention_dim": 32, "use_linear_projection": True},
    "TransformerTemporalModel": {**HEADS, "in_channels": 64, "cross_attention_dim": 32},
    "UNet1DModel": {
        "in_channels": 2, "out_channels": 2, "sample_size": 32, "extra_in_channels": 16,
        "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "block_out_channels": (32, 32),
        "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
    },
    "UNet2DConditionModel": {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "use_linear_projection": True,
        "cross_attention_dim": 32,
    },
    "UNet2DModel": {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet3DConditionModel": {
        **UNET_3D, "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 32, "vocab_size": 32, "codebook_size": 24, "in_channels": 32, "block_out_channels": 32,
        "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "sample_size": 8,
    },
    "WanAnimate2Transformer3DModel": {
        "text_len": 4, "in_dim": 8, "dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32, "out_dim": 4,
        "num_heads": 4, "num_layers": 1, "use_img_emb": False,
    },
    "WanAnimateTransformer3DModel": {
        **WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 32, "num_attention_heads": 2,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
        "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 1,
    },
    "WanTransformer3DModel": {**WAN, "image_dim": 32, "added_kv_proj_dim": 64},
    "WanVACETransformer3DModel": {**WAN, "vace_layers": [0], "vace_in_channels": 12},
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [16, 8, 8],
    },
}  # fmt: skip
