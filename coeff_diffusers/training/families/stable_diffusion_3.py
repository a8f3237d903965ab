"""Stable Diffusion 3 and 3.5: a transformer of double streams, two CLIP text encoders and T5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily


class StableDiffusion3(FlowFamily):
    supported = ("StableDiffusion3Pipeline",)
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    longest_sequence = 512

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.check_channels(pipeline.vae.config.latent_channels)

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        return int(self.pipeline.patch_size * self.pipeline.vae_scale_factor)

    def check_size(self, side: int, setting: str) -> int:
        longest = self.pipeline.transformer.config.pos_embed_max_size * self.size_multiple
        if side > longest:
            raise InputError(
                f"--{setting} must be {longest} at most on this model, whose positions end there, got {side}"
            )
        return super().check_size(side, setting)

    def token_limits(self) -> dict[str, int]:
        limits = dict.fromkeys(("tokenizer", "tokenizer_2"), self.pipeline.tokenizer_max_length)
        has_t5 = self.pipeline.text_encoder_3 is not None
        return limits | ({"tokenizer_3": self.max_sequence_length} if has_t5 else {})

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width) of CLIP's, then of T5's; `pooled`: (width,) of CLIP's side by side."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [{"prompt_embeds": embedding, "pooled": one} for embedding, one in zip(embeddings, pooled)]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        prediction: Tensor = denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
        return prediction
