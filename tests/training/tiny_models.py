"""Tiny pipelines of the families of diffusion models, built from config.

The weights are random and large, so that the images depend on the prompt and on every attention. What a training
loop has to know of a family is as in its published models: the scheduler, how the latents are scaled, shifted and
packed, which text encoders there are and which of their layers are read, and the conditions beside the text.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import tiny_sd
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from hosts import visible
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 32  # pixels of an image that every family makes
CHANNELS = 4  # of the latents
WIDTH = 16  # of the text encoders

# The words of `QwenImagePipeline.prompt_template_encode`, with Ġ for a space before them as in a vocabulary of bytes.
INSTRUCTION = (
    "system Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext Ġspatial Ġrelationships "
    "Ġof Ġobjects Ġand Ġbackground user"
)

# The part of Qwen3's template that one message of a user needs.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def tiny_pipeline(name: str) -> DiffusionPipeline:
    """The family's pipeline, always with the same weights.

    Args:
        name: the pipeline's class, one of `FAMILIES`.
    """
    torch.manual_seed(0)
    pipeline: DiffusionPipeline = _BUILDERS[name]()
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipeline


def call_settings(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call, beside `prompt=`, that make a small image soon."""
    settings: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "np"}
    if name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"):
        settings["use_resolution_binning"] = False  # which makes images of about 1024 pixels and shrinks them
        settings["clean_caption"] = False  # which needs packages that may be missing
    return settings | changes


def _t5_tokenizer() -> T5Tokenizer:
    """One token a letter."""
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(letter, -2.0) for letter in "▁" + string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and one for each word of the instruction that Qwen-Image puts before a prompt.

    That pipeline drops the first 34 tokens, which are the instruction's only if each of its words is a token.
    """
    words = sorted(ByteLevel.alphabet())
    merges = []
    for word in INSTRUCTION.split():
        for end in range(2, len(word) + 1):
            if word[:end] not in words:
                words.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    return Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words + special)},
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=131072,
    )


def _gemma_tokenizer() -> GemmaTokenizer:
    """One token a letter, others by their bytes; <bos> comes first."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += ["▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def _clip(model: type[nn.Module], tokenizer: Any, width: int = WIDTH) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        projection_dim=width,
        num_hidden_layers=2,  # the last but one is read
        num_attention_heads=2,
        max_position_embeddings=tiny_sd.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return visible(model(config))


def _t5(tokenizer: Any, width: int = WIDTH) -> Any:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return visible(T5EncoderModel(config))


def _qwen3(model: type[nn.Module], tokenizer: Any, layers: int) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return visible(model(config))


def _gemma2(tokenizer: Any) -> Any:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return visible(Gemma2Model(config))


def _vae_config(blocks: int = 2) -> dict[str, Any]:
    """Of a VAE that shrinks images by 2 ** (blocks - 1)."""
    return {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "layers_per_block": 1,
        "latent_channels": CHANNELS,
        "norm_num_groups": 4,
        "sample_size": SIDE,
    }


def _flux_vae(blocks: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        **_vae_config(blocks),
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizers = [tiny_sd.tiny_tokenizer() for _ in range(2)]
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**_vae_config(), scaling_factor=0.13025),
        text_encoder=_clip(CLIPTextModel, tokenizers[0]),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizers[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=visible(unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def _sd3() -> StableDiffusion3Pipeline:
    tokenizers = [tiny_sd.tiny_tokenizer() for _ in range(2)]
    t5_tokenizer = _t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=AutoencoderKL(
            **_vae_config(),
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
        ),
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizers[0]),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizers[1]),
        text_encoder_3=_t5(t5_tokenizer, width=40),  # wider than the two others side by side
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=t5_tokenizer,
        transformer=visible(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> FluxPipeline:
    tokenizer, t5_tokenizer = tiny_sd.tiny_tokenizer(), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        vae=_flux_vae(),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_t5(t5_tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
        transformer=visible(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _pixart(pipeline: type[DiffusionPipeline], scaling_factor: float, **config: Any) -> DiffusionPipeline:
    tokenizer = _t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_layers=1,
        patch_size=2,
        attention_head_dim=12,
        num_attention_heads=2,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,  # noise and variance
        cross_attention_dim=24,
        caption_channels=WIDTH,
        **config,
    )
    return pipeline(
        vae=AutoencoderKL(**_vae_config(), scaling_factor=scaling_factor),
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=visible(transformer),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def _pixart_alpha() -> DiffusionPipeline:
    # at this size the pipeline passes the image's size and aspect ratio on, as for the published 1024-pixel model
    return _pixart(PixArtAlphaPipeline, 0.18215, sample_size=128, use_additional_conditions=True)


def _pixart_sigma() -> DiffusionPipeline:
    return _pixart(PixArtSigmaPipeline, 0.13025, sample_size=SIDE // 2, use_additional_conditions=False)


def _flux2_klein() -> Flux2KleinPipeline:
    tokenizer = _qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(**_vae_config())
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        vae=vae,
        text_encoder=_qwen3(Qwen3ForCausalLM, tokenizer, layers=28),  # the 9th, 18th and 27th are read
        tokenizer=tokenizer,
        transformer=visible(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _qwen_image() -> QwenImagePipeline:
    tokenizer = _qwen_tokenizer()
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    image_ids = dict.fromkeys(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), len(tokenizer) - 1
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, **image_ids)
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )
    return QwenImagePipeline(
        vae=vae,
        text_encoder=visible(text_encoder),
        tokenizer=tokenizer,
        transformer=visible(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
        ),
    )


def _z_image() -> ZImagePipeline:
    tokenizer = _qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
    )
    return ZImagePipeline(
        vae=_flux_vae(),
        text_encoder=_qwen3(Qwen3Model, tokenizer, layers=2),
        tokenizer=tokenizer,
        transformer=visible(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _sana() -> SanaPipeline:
    tokenizer = _gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
    )
    vae = AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        vae=vae,
        text_encoder=_gemma2(tokenizer),
        tokenizer=tokenizer,
        transformer=visible(transformer),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
        ),
    )


def _lumina2() -> Lumina2Pipeline:
    tokenizer = _gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=SIDE // 8,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        vae=_flux_vae(blocks=4),  # the pipeline takes it for granted that images shrink by 8
        text_encoder=_gemma2(tokenizer),
        tokenizer=tokenizer,
        transformer=visible(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


_BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "StableDiffusionPipeline": tiny_sd.tiny_pipeline,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "PixArtAlphaPipeline": _pixart_alpha,
    "PixArtSigmaPipeline": _pixart_sigma,
    "Flux2KleinPipeline": _flux2_klein,
    "QwenImagePipeline": _qwen_image,
    "ZImagePipeline": _z_image,
    "SanaPipeline": _sana,
    "Lumina2Pipeline": _lumina2,
}

FAMILIES: tuple[str, ...] = tuple(_BUILDERS)
