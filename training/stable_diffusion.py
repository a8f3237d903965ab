"""What is particular to Stable Diffusion 1.x and 2.x: how a batch becomes a loss.

latents = VAE(pixels)                              t uniform over the schedule, noise ~ N(0, 1)
noisy   = sqrt(a_t) latents + sqrt(1 - a_t) noise
loss    = || UNet(noisy, t, prompt) - target ||^2      target by the model's prediction type
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from settings import DreamBoothSettings, InputError
from torch import Tensor, nn

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class StableDiffusion:
    """A loaded pipeline of the family, on its device, and the training loss on it."""

    supported = ("StableDiffusionPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._check()

    @classmethod
    def load(cls, settings: DreamBoothSettings, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """Loads and freezes everything. The safety checker takes no part in training."""
        pipeline = StableDiffusionPipeline.from_pretrained(
            settings.pretrained_model_name_or_path,
            revision=settings.revision,
            variant=settings.variant,
            safety_checker=None,
            requires_safety_checker=False,
            dtype=dtype,
        ).to(device)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        return cls(pipeline)

    @property
    def denoiser(self) -> nn.Module:
        """What is trained: the UNet."""
        unet: nn.Module = self.pipeline.unet
        return unet

    def resolution(self, asked: int | None) -> int:
        """The side of the pictures in pixels: what was asked for, or what the UNet was trained at."""
        factor = self.pipeline.vae_scale_factor
        side = self.pipeline.unet.config.sample_size
        if asked is None:
            return int((side if isinstance(side, int) else min(side)) * factor)
        if asked % factor:
            raise InputError(f"--resolution must be a multiple of {factor} on this model, got {asked}")
        return asked

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises InputError naming every prompt that the text encoder would see cut off."""
        tokenizer = self.pipeline.tokenizer
        limit = min(tokenizer.model_max_length, self.pipeline.text_encoder.config.max_position_embeddings)
        counts = {prompt: len(tokenizer(prompt, truncation=False, verbose=False).input_ids) for prompt in prompts}
        problems = [f"{prompt!r} has {count} tokens" for prompt, count in counts.items() if count > limit]
        if problems:
            raise InputError(
                f"the tokenizer takes {limit} tokens (start and end included), and the rest would be lost:\n  "
                + "\n  ".join(problems)
            )

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """(prompts, tokens, width)."""
        embeddings: Tensor = self.pipeline.encode_prompt(prompts, self.pipeline.device, 1, False)[0]
        return embeddings

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Pixels (B, 3, side, side) in [-1, 1] to float32 latents (B, C, side / 8, side / 8)."""
        vae = self.pipeline.vae
        latents: Tensor = retrieve_latents(vae.encode(pixels.to(vae.device, vae.dtype)), generators)
        return latents.float() * float(vae.config.scaling_factor)

    def loss(
        self,
        denoiser: nn.Module,
        pixels: Tensor,
        embeddings: Tensor,
        seeds: list[int],
        prior_loss_weight: float | None = None,
        snr_gamma: float | None = None,
    ) -> Tensor:
        """The loss of a batch, whose second half are class pictures if there is a `prior_loss_weight`.

        Args:
            denoiser: the UNet, or what accelerate made of it.
            pixels: (B, 3, side, side) in [-1, 1].
            embeddings: (B, tokens, width), the prompt of each picture.
            seeds: of each picture's noise and timestep.
            prior_loss_weight: weight of the class pictures; `None` if there are none.
            snr_gamma: as in [`min_snr_weights`]; `None` weighs all timesteps alike.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = self.encode_images(pixels, generators)
        scheduler, last = self.noise_scheduler, self.noise_scheduler.config.num_train_timesteps
        noise = randn_tensor(latents.shape, generators, latents.device, latents.dtype)
        timesteps = torch.cat([torch.randint(last, (1,), generator=g) for g in generators]).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = denoiser(noisy, timesteps, embeddings, return_dict=False)[0]
        target = self.target(latents, noise, timesteps)
        weights = None if snr_gamma is None else self.min_snr_weights(timesteps, snr_gamma)
        return dreambooth_loss(prediction, target, weights, prior_loss_weight)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet of this model should answer."""
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return noise
        if self.noise_scheduler.config.prediction_type == "sample":
            return latents
        velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) on the error of the picture itself (arXiv 2303.09556), for what this model predicts."""
        snr: Tensor = compute_snr(self.noise_scheduler, timesteps)
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            return (gamma / snr).clamp(max=1.0)  # also where the last timestep has no signal left, SNR = 0
        return snr.clamp(max=gamma) / (snr + 1.0) if kind == "v_prediction" else snr.clamp(max=gamma)

    def _check(self) -> None:
        vae, unet, kind = self.pipeline.vae, self.pipeline.unet, self.noise_scheduler.config.prediction_type
        if kind not in PREDICTION_TYPES:
            raise InputError(f"the scheduler's prediction_type must be of {', '.join(PREDICTION_TYPES)}, got {kind!r}")
        if unet.config.in_channels != vae.config.latent_channels:
            raise InputError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE gives {vae.config.latent_channels}: "
                "inpainting and other conditioned models cannot be trained"
            )


def dreambooth_loss(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, prior_loss_weight: float | None = None
) -> Tensor:
    """Mean squared error, computed in float32.

    Args:
        prediction: (B, C, h, w).
        target: (B, C, h, w).
        weights: (B,), a factor on each picture's error.
        prior_loss_weight: if given, the second half of the batch are class pictures, and the loss is the mean over the
            first half plus this factor times the mean over the second.

    Raises:
        ValueError: if there are class pictures and B is odd.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)  # (B,)
    if weights is not None:
        errors = errors * weights
    if prior_loss_weight is None:
        return errors.mean()
    if len(errors) % 2:
        raise ValueError(f"a batch of subject and class pictures must be even, got {len(errors)}")
    subject, prior = errors.chunk(2)
    return subject.mean() + prior_loss_weight * prior.mean()
