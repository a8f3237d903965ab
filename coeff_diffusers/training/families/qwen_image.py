"""Qwen-Image: a transformer of double streams, and the text half of Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily, pad_prompts

NEGATIVE_PROMPT = " "  # of the pipeline's own example


class QwenImage(FlowFamily):
    """Latents (B, C, height, width) are those of the VAE, which is one of videos, without its dimension of frames."""

    supported = ("QwenImagePipeline",)
    longest_sequence = 1024

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        config = pipeline.vae.config
        self.check_channels(4 * config.z_dim)
        if pipeline.transformer.config.guidance_embeds:
            raise InputError("the transformer was distilled to take the guidance scale: such models cannot be trained")
        self.mean, self.deviation = (
            torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def tokenized_text(self, prompt: str) -> str:
        text: str = self.pipeline.prompt_template_encode.format(prompt)
        return text

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.pipeline.prompt_template_encode_start_idx + self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width), of as many tokens as the prompt has."""
        embeddings, mask = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=self.max_sequence_length
        )
        lengths = [embeddings.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return [{"prompt_embeds": embedding[:length]} for embedding, length in zip(embeddings, lengths)]

    def unconditional(self) -> Conditions:
        return self.encode_prompts([NEGATIVE_PROMPT])[0]

    def collate(self, conditions: list[Conditions]) -> Conditions:
        return pad_prompts(conditions)

    def call_arguments(self, prompts: list[str], guidance_scale: float | None = None) -> dict[str, Any]:
        """The pipeline guides by `true_cfg_scale`, and only if it is given a negative prompt."""
        arguments = super().call_arguments(prompts)
        if guidance_scale is not None:
            arguments["true_cfg_scale"] = guidance_scale
        guided = guidance_scale is None or guidance_scale > 1
        return arguments | {"negative_prompt": NEGATIVE_PROMPT} if guided else arguments

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels.unsqueeze(2)).squeeze(3)

    def decode_images(self, latents: Tensor) -> Tensor:
        return super().decode_images(latents.unsqueeze(2)).squeeze(2)

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self.mean.to(latents)) / self.deviation.to(latents)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        factor, mask = self.pipeline.vae_scale_factor, conditions["mask"]
        batch, channels, height, width = noisy.shape
        prediction = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=None,
            encoder_hidden_states_mask=None if mask.all() else mask,
            encoder_hidden_states=conditions["prompt_embeds"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipeline._unpack_latents(prediction, height * factor, width * factor, factor)
        return unpacked.squeeze(2)
