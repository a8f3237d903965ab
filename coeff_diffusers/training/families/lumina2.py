"""Lumina Image 2.0: a transformer of one stream, and a Gemma 2 text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily


class Lumina2(FlowFamily):
    """The transformer's time runs from noise at 0 to the image at 1, and its answer the same way."""

    supported = ("Lumina2Pipeline",)
    lora_targets = ("to_q", "to_k", "to_v")
    longest_sequence = 512

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.check_channels(pipeline.vae.config.latent_channels)

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.default_image_size)

    @property
    def size_multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def tokenized_text(self, prompt: str) -> str:
        return f"{self.pipeline.system_prompt} <Prompt Start> {prompt}"

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width); `mask`: (tokens,); padded to one length for all."""
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return [{"prompt_embeds": embedding, "mask": kept} for embedding, kept in zip(embeddings, mask)]

    def unconditional(self) -> Conditions:
        """Without the system prompt."""
        _, _, embeddings, mask = self.pipeline.encode_prompt(
            "", device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings[0], "mask": mask[0]}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        answer: Tensor = denoiser(
            hidden_states=noisy,
            timestep=1 - timesteps / self.noise_scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["mask"],
            return_dict=False,
        )[0]
        return -answer
