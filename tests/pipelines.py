"""Tiny pipelines of diffusers with random weights, in the layout that hubs hold: one folder for each component."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

FLOW = {"shift": 3.0}
CLIP = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 77, "bos_token_id": 258, "eos_token_id": 259, "pad_token_id": 259, "projection_dim": 64,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 257,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 10000.0,
}  # fmt: skip


def clip_tokenizer() -> Any:
    import transformers

    letters = sorted(ByteLevel.alphabet())  # 256
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {"a</w>": 256, "o</w>": 257, "<|startoftext|>": 258, "<|endoftext|>": 259}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.0123456789"]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=32)


def qwen_tokenizer() -> Any:
    import transformers

    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {"<|endoftext|>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=128)


def clip(pooled: bool = False) -> Any:
    import transformers

    kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**CLIP))


def t5() -> Any:
    import transformers

    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def vae(channels: int, **changes: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=16,
        **changes,
    )  # fmt: skip


def flux() -> Any:
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def sd3() -> Any:
    """Without the third text encoder, as many run it."""
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=64, pooled_projection_dim=128, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(pooled=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(pooled=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=None, tokenizer_3=None, transformer=transformer,
    )  # fmt: skip


def qwen_image() -> Any:
    import diffusers
    import transformers

    text = transformers.Qwen2_5_VLConfig(
        text_config=QWEN,
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 14, "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.0, 1.1, 0.9, 1.2],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW), vae=autoencoder,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(text), tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def pixart() -> Any:
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        cross_attention_dim=64, caption_channels=64, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae(4), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sdxl() -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=112,
        cross_attention_dim=128,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip(), text_encoder_2=clip(pooled=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet, add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
    )  # fmt: skip


def wan() -> Any:
    import diffusers
    import transformers

    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=64, freq_dim=32, ffn_dim=128, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        )  # fmt: skip

    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.0, 1.1, 0.9, 1.2], scale_factor_temporal=2,
        scale_factor_spatial=4,
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
        vae=autoencoder, scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=3.0), transformer=transformer(), transformer_2=transformer(),
        boundary_ratio=0.8,
    )  # fmt: skip


def sd() -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(4), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def gemma_tokenizer() -> Any:
    import transformers

    letters = {letter: 4 + number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    return transformers.GemmaTokenizer(vocab={**special, **letters, "▁": 270}, merges=[])


def gemma() -> Any:
    import transformers

    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip


def lumina2() -> Any:
    import diffusers

    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5,
        scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(300, 128, 128), cap_feat_dim=64,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4, shift_factor=0.1),
        text_encoder=gemma(), tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def sana() -> Any:
    import diffusers

    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=64,
        sample_size=32,
    )  # fmt: skip
    blocks = ("ResBlock", "EfficientViTBlock")
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), vae=autoencoder,
        text_encoder=gemma(), tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def ltx() -> Any:
    """With a decoder that adds one field of noise to all samples, as those of LTX 0.9.1 and later do."""
    import diffusers

    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=64,
    )  # fmt: skip
    four, five = (8,) * 4, (1,) * 5
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=four, decoder_block_out_channels=four,
        layers_per_block=five, decoder_layers_per_block=five, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(True,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    for name, parameter in autoencoder.named_parameters():
        if "per_channel_scale" in name:
            parameter.data.fill_(0.5)  # 0 when new: the noise then changes nothing
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder, text_encoder=t5(),
        tokenizer=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "sd3": sd3,
    "qwen_image": qwen_image,
    "pixart": pixart,
    "sdxl": sdxl,
    "wan": wan,
}
MORE_PIPELINES: dict[str, Callable[[], Any]] = {"sd": sd, "lumina2": lumina2, "sana": sana, "ltx": ltx}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {  # of a call that takes no time
    "flux": {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16},
    "sd3": {"height": 32, "width": 32, "num_inference_steps": 2},
    "qwen_image": {
        "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "negative_prompt": "blur",
    },
    "pixart": {
        "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16,
        "use_resolution_binning": False, "clean_caption": False,
    },
    "sdxl": {"height": 32, "width": 32, "num_inference_steps": 2},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16},
    "sd": {"height": 32, "width": 32, "num_inference_steps": 2},
    "lumina2": {
        "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 64, "system_prompt": "s",
    },
    "sana": {
        "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 64,
        "use_resolution_binning": False, "complex_human_instruction": None,
    },
    "ltx": {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 32},
}  # fmt: skip


def save_pipeline(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A pipeline as its library saves it, with the weights of its seed in one dtype."""
    torch.manual_seed(0)
    pipeline = {**PIPELINES, **MORE_PIPELINES}[name]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def names_in(folder: Path) -> dict[str, Any]:
    names: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    return names


def load_components(folder: Path | str, backend: Any = None, **config: Any) -> tuple[Any, dict[str, Any]]:
    """(the model source, each component loaded by us), the denoiser quantized as `backend` says."""
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.loading.lifecycle import load_component
    from qexp.models.diffusers import DiffusersConfig, Source
    from tests.backends import CPU, backend_config

    source, dense = Source(DiffusersConfig(path=str(folder), **config)), backend_config("none")
    chosen, quantized = backend or dense, source.quantized_components()
    settings = {name: ComponentConfig(chosen if name in quantized else dense) for name in source.components()}
    models = {
        name: load_component(source, name, component, device=CPU, loader=LoaderConfig()).model
        for name, component in settings.items()
    }
    return source, models
