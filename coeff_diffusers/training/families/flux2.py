"""FLUX.2 [klein]: a transformer of double and single streams, and one Qwen3 text encoder."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, FlowFamily


class Flux2Klein(FlowFamily):
    """Latents are patches of 2 x 2, (B, 4 C, height, width), normalised by the statistics of the VAE's batch norm."""

    supported = ("Flux2KleinPipeline",)

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        vae = pipeline.vae
        self.check_channels(4 * vae.config.latent_channels)
        self.mean = vae.bn.running_mean.view(-1, 1, 1).float()
        self.deviation = (vae.bn.running_var.view(-1, 1, 1).float() + vae.config.batch_norm_eps).sqrt()
        single = [f"single_transformer_blocks.{i}.attn" for i in range(pipeline.transformer.config.num_single_layers)]
        self.lora_targets += tuple(
            f"{attention}.{layer}" for attention in single for layer in ("to_qkv_mlp_proj", "to_out")
        )
        if pipeline.config.is_distilled:
            warnings.warn(
                "this model was distilled to few steps, and training can undo that; train its base model, FLUX.2 "
                "[klein] base, whose coefficients and LoRA the distilled one takes too",
                stacklevel=2,
            )

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def tokenized_text(self, prompt: str) -> str:
        text: str = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return text

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width), of several layers of the encoder, padded to one length for all."""
        embeddings = self.pipeline.encode_prompt(prompts, self.device, max_sequence_length=self.max_sequence_length)[0]
        return [{"prompt_embeds": embedding} for embedding in embeddings]

    def normalise(self, latents: Tensor) -> Tensor:
        patches: Tensor = self.pipeline._patchify_latents(latents)
        normalised: Tensor = (patches - self.mean.to(patches)) / self.deviation.to(patches)
        return normalised

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        embeddings = conditions["prompt_embeds"]
        prediction: Tensor = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy),
            timestep=timesteps / 1000,
            guidance=None,
            encoder_hidden_states=embeddings,
            txt_ids=self.pipeline._prepare_text_ids(embeddings).to(noisy.device),
            img_ids=self.pipeline._prepare_latent_ids(noisy).to(noisy.device),
            return_dict=False,
        )[0]
        return prediction.mT.reshape(noisy.shape)  # (B, height * width, channels)
