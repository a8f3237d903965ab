"""PixArt-alpha and PixArt-Sigma: a transformer of self- and cross-attention, and T5."""

from __future__ import annotations

import math
from typing import Any

from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, DiffusionFamily


class PixArt(DiffusionFamily):
    supported = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.check_channels(pipeline.vae.config.latent_channels)
        self.clean_caption = is_bs4_available() and is_ftfy_available()  # else the pipeline only warns of them

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        patch = self.pipeline.transformer.config.patch_size * self.pipeline.vae_scale_factor
        return math.lcm(8, int(patch))  # the pipeline checks for 8

    def tokenized_text(self, prompt: str) -> str:
        text: str = self.pipeline._text_preprocessing(prompt, clean_caption=self.clean_caption)[0]
        return text

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width); `mask`: (tokens,); padded to one length for all."""
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            clean_caption=self.clean_caption,
            max_sequence_length=self.max_sequence_length,
        )
        return [{"prompt_embeds": embedding, "mask": kept} for embedding, kept in zip(embeddings, mask)]

    def call_arguments(self, prompts: list[str], guidance_scale: float | None = None) -> dict[str, Any]:
        return super().call_arguments(prompts, guidance_scale) | {"clean_caption": self.clean_caption}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        transformer, embeddings = self.pipeline.transformer, conditions["prompt_embeds"]
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            side = sizes[:, 4:].to(embeddings)
            added = {"resolution": side, "aspect_ratio": side[:, :1] / side[:, 1:]}
        prediction: Tensor = denoiser(
            noisy,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=conditions["mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction[:, : transformer.config.in_channels]  # without the variance that it also learned
