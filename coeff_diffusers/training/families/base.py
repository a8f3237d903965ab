"""What differs between families of models. The loop, the data and the files are the same for all of them.

A family's file has one class, which says how prompts are encoded, how images become latents and back into the
denoiser's input and target. Two intermediate classes hold the two objectives that there are:
[`DiffusionFamily`] (a noise schedule, as of DDPM) and [`FlowFamily`] (rectified flow).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...sampling import sampling_defaults
from ..errors import InputError
from ..settings.dreambooth import ObjectiveSettings
from .losses import squared_errors

Conditions = dict[str, Tensor]
OFFSET = 0.1  # of --offset_noise, as in diffusers' scripts, from crosslabs.org/blog/diffusion-with-offset-noise


class Family(ABC):
    """A loaded pipeline of one family, on its device, and the training errors of images on it.

    The denoiser, its largest part, may come later, by `load_denoiser`.

    Args:
        pipeline: frozen, of one of the classes in `supported`.
        settings: of the run.

    Raises:
        InputError: if this pipeline cannot be trained, or a setting does not go with it.
    """

    supported: ClassVar[tuple[str, ...]]  # names of pipeline classes
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    load_arguments: ClassVar[dict[str, Any]] = {}  # of from_pretrained, beside the usual ones
    takes_guidance: ClassVar[bool] = False  # as a condition of the denoiser
    longest_sequence: ClassVar[int | None] = None  # the largest max_sequence_length that the pipeline's call accepts

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        self.pipeline, self.settings = pipeline, settings
        self._check_sequence_length()
        if settings.guidance_scale is not None and not self.takes_guidance:
            raise InputError(
                "--guidance_scale: this model does not take it as a condition, as FLUX.1 [dev] does; that of images "
                "is --validation_guidance_scale"
            )
        self._remembered: dict[str, Conditions] = {}
        self.trained_text_encoders: list[nn.Module] = []
        self.denoiser_loader: Callable[[], nn.Module] | None = None  # `None` once it is loaded
        self.released = 0  # parameters that the pipeline had before its text encoders were released

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or the transformer."""
        denoiser: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return denoiser

    def check_channels(self, given: int) -> None:
        """Raises InputError if the denoiser takes other channels than latents have, as those of edited images do."""
        taken: int = self.pipeline.components[self.denoiser_name].config.in_channels
        if taken != given:
            raise InputError(
                f"the {self.denoiser_name} takes {taken} channels and the latents have {given}: models for "
                "inpainting, editing and others with more conditions than a prompt cannot be trained"
            )

    def load_denoiser(self) -> None:
        """Puts the denoiser in the place of the model that has its config alone, if that is not done yet."""
        if self.denoiser_loader is not None:
            self.pipeline.register_modules(**{self.denoiser_name: self.denoiser_loader()})
            self.denoiser_loader = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipeline.components[self.denoiser_name].device
        return device

    # Sizes

    @property
    @abstractmethod
    def own_resolution(self) -> int:
        """The side in pixels that the model was trained at."""

    @property
    def size_multiple(self) -> int:
        """What the height and the width of images must be multiples of."""
        return int(self.pipeline.vae_scale_factor)

    def check_size(self, side: int, setting: str) -> int:
        """Returns `side`, or raises InputError if images of this model cannot have it."""
        if side % self.size_multiple:
            raise InputError(f"--{setting} must be a multiple of {self.size_multiple} on this model, got {side}")
        return side

    # Prompts

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        """What the denoiser is conditioned on for each prompt: embeddings and others, without a batch dimension.

        Computes gradients where they are enabled.
        """

    def _check_sequence_length(self) -> None:
        length = self.settings.max_sequence_length
        if length is not None and "max_sequence_length" not in call_parameters(self.pipeline):
            raise InputError("--max_sequence_length: the text encoders of this model take one number of tokens only")
        if length is not None and self.longest_sequence is not None and length > self.longest_sequence:
            raise InputError(
                f"--max_sequence_length must be {self.longest_sequence} at most on this model, got {length}"
            )

    @property
    def max_sequence_length(self) -> int:
        """How many tokens of a prompt the pipeline's encode_prompt is to take."""
        default = call_parameters(self.pipeline)["max_sequence_length"].default
        return int(self.settings.max_sequence_length or default)

    def tokenized_text(self, prompt: str) -> str:
        """What the tokenizer gets for a prompt, with the template or the instruction of models that have one."""
        return prompt

    def token_limits(self) -> dict[str, int]:
        """Tokenizer's component name -> how many tokens its encoder takes, start and end included."""
        encoders = ((name.replace("text_encoder", "tokenizer"), name) for name in self.text_encoder_names)
        there = {name: (getattr(self.pipeline, name), getattr(self.pipeline, encoder)) for name, encoder in encoders}
        return {
            name: min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for name, (tokenizer, encoder) in there.items()
            if encoder is not None
        }

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises InputError naming every prompt of which no text encoder would see the end."""
        limits = self.token_limits()
        name = max(limits, key=lambda name: limits[name])
        tokenizer = getattr(self.pipeline, name)
        texts = {prompt: self.tokenized_text(prompt) for prompt in prompts}
        counts = {
            prompt: len(tokenizer(text, truncation=False, verbose=False).input_ids) for prompt, text in texts.items()
        }
        problems = [f"{prompt!r} has {count} tokens" for prompt, count in counts.items() if count > limits[name]]
        if problems:
            raise InputError(
                f"the tokenizer takes {limits[name]} tokens (start and end included), and the rest would be lost:\n  "
                + "\n  ".join(problems)
            )

    def unconditional(self) -> Conditions:
        """What --caption_dropout trains on: what the pipeline guides away from if it is given no negative prompt."""
        return self.encode_prompts([""])[0]

    def encode(self, prompts: Sequence[str]) -> list[Conditions]:
        """As [`encode_prompts`], with what is unconditional for the empty prompt."""
        texts = [prompt for prompt in prompts if prompt]
        conditions = iter(self.encode_prompts(texts) if texts else [])
        return [next(conditions) if prompt else self.unconditional() for prompt in prompts]

    @torch.no_grad()
    def remember_prompts(self, prompts: Sequence[str]) -> None:
        """Encodes prompts once for the whole run, so that the text encoders are no longer needed for them."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._remembered:
                self._remembered[prompt] = self.encode([prompt])[0]

    def conditions(self, prompts: list[str]) -> Conditions:
        """Of a batch, each tensor with a dimension for it: remembered, or encoded now."""
        if any(prompt not in self._remembered for prompt in prompts):
            return self.collate(self.encode(prompts))
        return self.collate([self._remembered[prompt] for prompt in prompts])

    def collate(self, conditions: list[Conditions]) -> Conditions:
        """Makes one of many. Families whose prompts differ in length pad here."""
        return {name: torch.stack([each[name] for each in conditions]) for name in conditions[0]}

    # Images

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, height, width) in [-1, 1] to mean and deviation of their latents, (B, 2, ...) in float32."""
        vae = self.pipeline.vae
        with _upcast(vae):
            encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        if not hasattr(encoded, "latent_dist"):  # an autoencoder without chance
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
            return torch.stack([latents, torch.zeros_like(latents)], dim=1).float()
        return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        """Latents (B, ...) as the mean of `encode_images` has them to pixels (B, 3, height, width)."""
        vae = self.pipeline.vae
        pixels: Tensor = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
        return pixels

    def sample_latents(self, moments: Tensor, generators: list[torch.Generator]) -> Tensor:
        """(B, 2, ...) to latents (B, ...) as the denoiser takes them: drawn, and normalised."""
        mean, deviation = moments.unbind(1)
        if self.settings.vae_encode_mode == "mode":
            return self.normalise(mean)
        return self.normalise(mean + deviation * randn(mean, generators))

    def normalise(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return (latents - shift) * float(config.scaling_factor)

    def call_arguments(self, prompts: list[str], guidance_scale: float | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call, beside size, steps and generators, for images of the model as it trains.

        Args:
            prompts: one per image.
            guidance_scale: `None` is the model's own.
        """
        arguments = sampling_defaults(self.pipeline)
        arguments["prompt"] = list(prompts)  # a copy, for there are pipelines that write into it
        if "use_resolution_binning" in call_parameters(self.pipeline):
            arguments["use_resolution_binning"] = False  # which makes images of other sizes and scales them
        if self.settings.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.settings.max_sequence_length
        return arguments if guidance_scale is None else arguments | {"guidance_scale": guidance_scale}

    # Errors

    @abstractmethod
    def errors(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditions: Conditions,
        sizes: Tensor,
        generators: list[torch.Generator],
        boxes: Tensor | None = None,
    ) -> Tensor:
        """The weighted squared error of each image, (B,) in float32.

        Args:
            denoiser: the model, or what wraps it.
            latents: (B, ...) as of `sample_latents`.
            conditions: of the images' prompts.
            sizes: (B, 6) integers: height and width of the file, top and left of the crop, height and width of it.
            generators: one per image, for all that is random about it.
            boxes: (B, 4), what of each image counts, as of [`squared_errors`].
        """

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor
    ) -> Tensor:
        """The denoiser's answer, in the shape of `noisy`. `timesteps` (B,) are those of the scheduler."""


class DiffusionFamily(Family):
    """Denoising with a noise schedule.

    t uniform over the schedule, noise ~ N(0, 1); with --offset_noise, one more number a channel is added all over it
    noisy = sqrt(a_t) latents + sqrt(1 - a_t) noise
    error = || denoiser(noisy, t, prompt) - target ||^2      target by the model's prediction type
    """

    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction", "sample")

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        kind = self.noise_scheduler.config.prediction_type
        if kind not in self.prediction_types:
            raise InputError(
                f"the scheduler's prediction_type must be of {', '.join(self.prediction_types)}, got {kind!r}"
            )
        if settings.weighting_scheme != "none":
            raise InputError("--weighting_scheme: this model is not trained by flow matching; see --snr_gamma")
        if settings.precondition_outputs:
            raise InputError("--precondition_outputs: this model is not trained by flow matching; see --snr_gamma")

    def errors(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditions: Conditions,
        sizes: Tensor,
        generators: list[torch.Generator],
        boxes: Tensor | None = None,
    ) -> Tensor:
        scheduler, last = self.noise_scheduler, self.noise_scheduler.config.num_train_timesteps
        noise = self.noise(latents, generators)
        timesteps = torch.cat([torch.randint(last, (1,), generator=g) for g in generators]).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = self.predict(denoiser, noisy, timesteps, conditions, sizes)
        gamma = self.settings.snr_gamma
        weights = None if gamma is None else self.min_snr_weights(timesteps, gamma)
        return squared_errors(prediction, self.target(latents, noise, timesteps), weights, boxes)

    def noise(self, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = randn(latents, generators)
        if self.settings.offset_noise:
            noise = noise + OFFSET * randn(latents[..., :1, :1], generators)
        return noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser of this model should answer."""
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return noise
        if self.noise_scheduler.config.prediction_type == "sample":
            return latents
        velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) on the error of the image itself (arXiv 2303.09556), for what this model predicts."""
        snr: Tensor = compute_snr(self.noise_scheduler, timesteps)
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            return (gamma / snr).clamp(max=1.0)  # also where the last timestep has no signal left, SNR = 0
        return snr.clamp(max=gamma) / (snr + 1.0) if kind == "v_prediction" else snr.clamp(max=gamma)


class FlowFamily(Family):
    """Rectified flow (arXiv 2403.03206).

    sigma in [0, 1] from the scheduler, at a place drawn by --weighting_scheme; noise ~ N(0, 1)
    noisy = (1 - sigma) latents + sigma noise
    error = weight(sigma) || denoiser(noisy, t, prompt) - (noise - latents) ||^2

    --precondition_outputs has the error of the image in place of that, noisy - sigma denoiser(...), which is sigma^2
    times as large.
    """

    def __init__(self, pipeline: Any, settings: ObjectiveSettings) -> None:
        super().__init__(pipeline, settings)
        self.noise_scheduler: Any = self.training_scheduler()
        if settings.snr_gamma is not None:
            raise InputError("--snr_gamma: this model is trained by flow matching; see --weighting_scheme")
        if settings.offset_noise:
            raise InputError("--offset_noise: this model is trained by flow matching, from noise without an offset")

    def errors(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditions: Conditions,
        sizes: Tensor,
        generators: list[torch.Generator],
        boxes: Tensor | None = None,
    ) -> Tensor:
        noise = randn(latents, generators)
        places = self._places(generators)
        timesteps = self.noise_scheduler.timesteps[places].to(latents.device)
        sigmas = self.noise_scheduler.sigmas[places].to(latents.device)
        spread = sigmas.view(-1, *[1] * (latents.ndim - 1))
        noisy = (1.0 - spread) * latents + spread * noise
        prediction = self.predict(denoiser, noisy, timesteps, conditions, sizes)
        weights = compute_loss_weighting_for_sd3(self.settings.weighting_scheme, sigmas)
        if self.settings.precondition_outputs:
            weights = weights * sigmas**2
        return squared_errors(prediction, noise - latents, weights, boxes)

    def training_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """At every timestep, shifted towards noise as the model was trained."""
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(
            self.pipeline.scheduler.config
        )
        return scheduler

    def _places(self, generators: list[torch.Generator]) -> Tensor:
        """Where in the scheduler's list of timesteps each image is, (B,)."""
        s, count = self.settings, self.noise_scheduler.config.num_train_timesteps
        densities = [
            compute_density_for_timestep_sampling(
                s.weighting_scheme, 1, s.logit_mean, s.logit_std, s.mode_scale, generator=generator
            )
            for generator in generators
        ]
        places: Tensor = (torch.cat(densities) * count).long().clamp(max=count - 1)
        return places


def randn(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Normal noise of the shape, dtype and device of `like`, sample b from generator b."""
    samples = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(samples).to(like.device, like.dtype)


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """In float32, where float16 would overflow and the VAE's config says so, as that of Stable Diffusion XL."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if not overflows:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


def pad_prompts(conditions: list[Conditions]) -> Conditions:
    """Makes one of prompts that differ in length.

    Args:
        conditions: `prompt_embeds` (tokens, width) of each.

    Returns:
        `prompt_embeds` (B, tokens of the longest, width), zeros after a prompt's end, and `mask` (B, tokens of the
        longest), true up to there.
    """
    embeddings = [each["prompt_embeds"] for each in conditions]
    masks = [torch.ones(len(embedding), dtype=torch.bool, device=embedding.device) for embedding in embeddings]
    return {
        "prompt_embeds": pad_sequence(embeddings, batch_first=True),
        "mask": pad_sequence(masks, batch_first=True),
    }


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Those of the pipeline's call, with their defaults."""
    return inspect.signature(type(pipeline).__call__).parameters
