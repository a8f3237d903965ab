"""Stable Diffusion XL: a UNet conditioned on the sizes of the image, and two CLIP text encoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor, nn

from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .base import Conditions, DiffusionFamily
from .losses import squared_errors


class StableDiffusionXL(DiffusionFamily):
    """Models whose scheduler is one of EDM (arXiv 2206.00364), as Playground 2.5, are trained as that paper has it.

    sigma uniform over the scheduler's list, noise ~ N(0, 1), s = sigma_data, r = sqrt(sigma^2 + s^2)
    noisy = latents + sigma noise
    error = || denoiser(noisy / r, log(sigma) / 4, prompt) - (sigma / s latents - s noise) / r ||^2

    That is the paper's loss on the image with its weight 1 / c_out^2, written as one on the denoiser's own answer,
    so that nothing is divided by a small sigma.
    """

    supported = ("StableDiffusionXLPipeline",)
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        config = pipeline.vae.config
        self.check_channels(config.latent_channels)
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise InputError("the UNet was distilled to take the guidance scale: such models cannot be trained")
        self.mean = _per_channel(config.latents_mean, 0.0)
        self.deviation = _per_channel(config.latents_std, 1.0) / config.scaling_factor
        self.edm: Any = _edm_scheduler(pipeline.scheduler) if "EDM" in type(pipeline.scheduler).__name__ else None
        if self.edm is not None and (settings.snr_gamma is not None or settings.offset_noise):
            raise InputError("--snr_gamma, --offset_noise: the scheduler of this model is one of EDM, without them")

    @property
    def own_resolution(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        return max(8, int(self.pipeline.vae_scale_factor))  # the pipeline checks for 8

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """`prompt_embeds`: (tokens, width) of both encoders side by side; `pooled`: (width,) of the second."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return [{"prompt_embeds": embedding, "pooled": one} for embedding, one in zip(embeddings, pooled)]

    def unconditional(self) -> Conditions:
        """Zeros, where the pipeline has them in the place of a prompt."""
        _, embeddings, _, pooled = self.pipeline.encode_prompt(
            "", device=self.device, do_classifier_free_guidance=True
        )
        return {"prompt_embeds": embeddings[0], "pooled": pooled[0]}

    def normalise(self, latents: Tensor) -> Tensor:
        normalised: Tensor = (latents - self.mean.to(latents)) / self.deviation.to(latents)
        return normalised

    def errors(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditions: Conditions,
        sizes: Tensor,
        generators: list[torch.Generator],
        boxes: Tensor | None = None,
    ) -> Tensor:
        if self.edm is None:
            return super().errors(denoiser, latents, conditions, sizes, generators, boxes)
        noise = self.noise(latents, generators)
        places = torch.cat([torch.randint(len(self.edm.timesteps), (1,), generator=g) for g in generators])
        timesteps = self.edm.timesteps[places].to(latents.device)
        sigma = self.edm.sigmas[places].to(latents.device).view(-1, 1, 1, 1)
        asked = self.edm.precondition_inputs(latents + sigma * noise, sigma)
        prediction = self.predict(denoiser, asked, timesteps, conditions, sizes)
        data = self.edm.config.sigma_data
        target = (sigma / data * latents - data * noise) / (sigma**2 + data**2).sqrt()
        target = -target if self.edm.config.prediction_type == "v_prediction" else target
        return squared_errors(prediction, target, boxes=boxes)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        embeddings, pooled = conditions["prompt_embeds"], conditions["pooled"]
        prediction: Tensor = denoiser(
            noisy,
            timesteps,
            embeddings,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.to(embeddings)},
            return_dict=False,
        )[0]
        return prediction


def _per_channel(values: Any, default: float) -> Tensor:
    return torch.tensor(default if values is None else values).view(-1, 1, 1)


def _edm_scheduler(scheduler: Any) -> Any:
    names = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "num_train_timesteps", "prediction_type", "rho")
    return EDMEulerScheduler(**{name: scheduler.config[name] for name in names})
