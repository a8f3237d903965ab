"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, DiffusionFamily


class StableDiffusion(DiffusionFamily):
    supported = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    load_arguments = {"safety_checker": None, "requires_safety_checker": False}  # noqa: RUF012

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.check_channels(pipeline.vae.config.latent_channels)
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise InputError("the UNet was distilled to take the guidance scale: such models cannot be trained")

    @property
    def own_resolution(self) -> int:
        side = self.pipeline.unet.config.sample_size
        return int((side if isinstance(side, int) else min(side)) * self.pipeline.vae_scale_factor)

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width)."""
        embeddings = self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]
        return [{"prompt_embeds": embedding} for embedding in embeddings]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        prediction: Tensor = denoiser(noisy, timesteps, conditions["prompt_embeds"], return_dict=False)[0]
        return prediction
