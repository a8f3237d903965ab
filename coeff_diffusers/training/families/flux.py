"""FLUX.1: a transformer of double and single streams, CLIP's pooled text and T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily

DEFAULT_GUIDANCE = 3.5  # of diffusers' script for FLUX.1, and of the pipeline's call


class Flux(FlowFamily):
    """FLUX.1 [dev] was distilled to take the guidance scale as a condition, `--guidance_scale` in training."""

    supported = ("FluxPipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    longest_sequence = 512
    takes_guidance = True

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.check_channels(4 * pipeline.vae.config.latent_channels)
        self.guided = bool(pipeline.transformer.config.guidance_embeds)
        if settings.guidance_scale is not None and not self.guided:
            raise InputError("--guidance_scale: this model takes none as a condition, such as FLUX.1 [schnell]")

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.pipeline.tokenizer_max_length, "tokenizer_2": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width) of T5's; `pooled`: (width,) of CLIP's."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return [{"prompt_embeds": embedding, "pooled": one} for embedding, one in zip(embeddings, pooled)]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        pipeline, embeddings = self.pipeline, conditions["prompt_embeds"]
        batch, channels, height, width = noisy.shape
        scale = DEFAULT_GUIDANCE if self.settings.guidance_scale is None else self.settings.guidance_scale
        prediction = denoiser(
            hidden_states=pipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=torch.full((batch,), scale, device=noisy.device) if self.guided else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=embeddings,
            txt_ids=embeddings.new_zeros(embeddings.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, embeddings.dtype),
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        unpacked: Tensor = pipeline._unpack_latents(prediction, height * factor, width * factor, factor)
        return unpacked
