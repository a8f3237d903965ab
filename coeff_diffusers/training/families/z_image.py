"""Z-Image: a transformer of one stream, and a Qwen3 text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily, pad_prompts


class ZImage(FlowFamily):
    """The transformer's time runs from noise at 0 to the image at 1, and its answer the same way."""

    supported = ("ZImagePipeline",)

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.check_channels(pipeline.vae.config.latent_channels)

    @property
    def own_resolution(self) -> int:
        return 1024  # of an image that the pipeline makes when no size is given

    @property
    def size_multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def tokenized_text(self, prompt: str) -> str:
        text: str = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width), of as many tokens as the prompt has."""
        embeddings, _ = self.pipeline.encode_prompt(
            list(prompts),  # a copy, for the pipeline writes its template into the list
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [{"prompt_embeds": embedding} for embedding in embeddings]

    def collate(self, conditions: list[Conditions]) -> Conditions:
        return pad_prompts(conditions)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        lengths = conditions["mask"].sum(1).tolist()
        answers = denoiser(
            list(noisy.unsqueeze(2)),  # of one frame each
            (1000 - timesteps) / 1000,
            [embedding[:length] for embedding, length in zip(conditions["prompt_embeds"], lengths)],
            return_dict=False,
        )[0]
        return -torch.stack(list(answers)).squeeze(2)
