"""Sana: a transformer of linear self-attention and cross-attention, and a Gemma 2 text encoder.

Linear attention forms no maps: coefficients go on the cross-attention alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily, call_parameters


class Sana(FlowFamily):
    supported = ("SanaPipeline",)
    lora_targets = ("to_q", "to_k", "to_v")

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        if pipeline.transformer.dtype == torch.float16:
            raise InputError(
                "--mixed_precision fp16: autocast computes this model's linear attention in float16, where it is not "
                "finite; use bf16 or no"
            )
        self.check_channels(pipeline.vae.config.latent_channels)
        self.instruction: list[str] = call_parameters(pipeline)["complex_human_instruction"].default

    def training_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The published scheduler is a DPM solver, which has the shift under another name."""
        config = self.pipeline.scheduler.config
        kind = config.get("prediction_type", "flow_prediction")
        if kind != "flow_prediction":
            raise InputError(f"the scheduler's prediction_type must be flow_prediction, got {kind!r}")
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift)

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        return math.lcm(32, int(self.pipeline.vae_scale_factor))  # the pipeline checks for 32

    def tokenized_text(self, prompt: str) -> str:
        return "\n".join(self.instruction) + prompt.lower().strip()

    def token_limits(self) -> dict[str, int]:
        instruction = self.pipeline.tokenizer.encode("\n".join(self.instruction))
        return {"tokenizer": len(instruction) + self.max_sequence_length - 2}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width); `mask`: (tokens,); padded to one length for all."""
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=self.instruction,
        )
        return [{"prompt_embeds": embedding, "mask": kept} for embedding, kept in zip(embeddings, mask)]

    def unconditional(self) -> Conditions:
        """Without the instruction."""
        _, _, embeddings, mask = self.pipeline.encode_prompt(
            "", device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings[0], "mask": mask[0]}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        config = self.pipeline.transformer.config
        prediction: Tensor = denoiser(
            noisy,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["mask"],
            timestep=timesteps * config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction[:, : config.in_channels]  # without the variance that some have
