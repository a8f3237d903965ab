"""What is particular to each family, and their objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler
from tiny_sd import MAX_TOKENS, tiny_pipeline

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families import Family
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.settings.dreambooth import DreamBoothSettings

SIZES = [16, 16, 0, 0, 16, 16]


def settings(**changes: object) -> DreamBoothSettings:
    given = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "instance_prompt": "a"}
    return DreamBoothSettings(**given | changes)


def stable_diffusion(pipeline: Any = None, **changes: object) -> StableDiffusion:
    return StableDiffusion(pipeline or tiny_pipeline(), settings(**changes))


def errors(family: Family, denoiser: Any, pixels: torch.Tensor, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """Of each image, as a training step computes them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = family.sample_latents(family.encode_images(pixels), generators)
    return family.errors(denoiser, latents, family.conditions(prompts), torch.tensor([SIZES] * len(seeds)), generators)


@pytest.fixture(scope="module")
def family() -> StableDiffusion:
    return stable_diffusion()


# Targets and weights


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_answer_of_each_prediction_type_has_no_loss(kind: str) -> None:
    family = stable_diffusion(tiny_pipeline(kind))
    seen = {}

    def perfect(noisy: torch.Tensor, timesteps: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        signal = family.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        latents = seen["latents"]
        noise = (noisy - signal.sqrt() * latents) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        return ({"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind],)

    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    seen["latents"] = family.sample_latents(family.encode_images(pixels), generators)
    loss = errors(family, perfect, pixels, ["a", "b"], [7, 8]).max()
    assert loss < 1e-6  # noise is got back by a division by sqrt(1 - a_t) >= 0.03, in float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_image_itself(kind: str) -> None:
    family = stable_diffusion(tiny_pipeline(kind))
    timesteps = torch.tensor([0, 100, 400, 700, 999])
    weights = family.min_snr_weights(timesteps, gamma=5.0)
    for t, weight in zip(timesteps.tolist(), weights.tolist()):
        signal = family.noise_scheduler.alphas_cumprod[t].double().item()
        snr = signal / (1 - signal)
        # || error of x0 ||^2 is || error of the prediction ||^2 times this
        to_image = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": 1.0}[kind]
        assert weight == pytest.approx(min(snr, 5.0) * to_image, rel=1e-4)  # float32 of alphas_cumprod near 1


def test_min_snr_is_finite_where_no_signal_is_left() -> None:
    for kind in ("epsilon", "v_prediction"):
        pipeline = tiny_pipeline(kind)
        pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True)
        family = stable_diffusion(pipeline)
        assert torch.isfinite(family.min_snr_weights(torch.tensor([999]), 5.0)).all()


def test_offset_noise_adds_one_number_a_channel() -> None:
    seen = []

    def note(noisy: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        seen.append(noisy)
        return (noisy,)

    pixels = torch.zeros(100, 3, 16, 16)
    for each in (stable_diffusion(), stable_diffusion(offset_noise=True)):
        each.noise_scheduler.alphas_cumprod = torch.zeros(1000)  # so that nothing but the noise is seen
        errors(each, note, pixels, ["a"] * 100, list(range(100)))
    added = seen[1] - seen[0]
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))
    assert added[..., 0, 0].std().item() == pytest.approx(0.1, rel=0.15)  # of 400 numbers, +- 3.5 %


def test_the_loss_of_an_image_does_not_depend_on_its_batch(family: StableDiffusion) -> None:
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    prompts, seeds = ["a", "b", "c"], [3, 4, 5]
    with torch.no_grad():
        together = errors(family, family.denoiser, pixels, prompts, seeds)
        alone = [errors(family, family.denoiser, pixels[i : i + 1], [prompts[i]], [seeds[i]]) for i in range(3)]
    # other sizes, other order of summation
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=0)


def test_timesteps_cover_the_schedule(family: StableDiffusion) -> None:
    seen = []

    def note(noisy: torch.Tensor, timesteps: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        seen.extend(timesteps.tolist())
        return (noisy,)

    pixels = torch.zeros(50, 3, 16, 16)
    for start in range(0, 500, 50):
        errors(family, note, pixels, ["a"] * 50, list(range(start, start + 50)))
    assert min(seen) >= 0
    assert max(seen) <= 999
    counts = torch.histc(torch.tensor(seen, dtype=torch.float), 10, 0, 1000)
    assert ((counts > 25) & (counts < 80)).all()  # 50 +- 6.7 each


# Models


def test_a_tiny_autoencoder_serves_as_vae() -> None:
    pipeline = tiny_pipeline()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipeline.register_modules(vae=vae)
    moments = stable_diffusion(pipeline).encode_images(torch.rand(2, 3, 16, 16))
    assert moments.shape == (2, 2, 4, 8, 8)
    assert not moments[:, 1].any()


def test_any_sampling_scheduler_gives_the_training_schedule() -> None:
    pipeline = tiny_pipeline("v_prediction")
    expected = stable_diffusion(pipeline).noise_scheduler
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    family = stable_diffusion(pipeline)
    assert family.noise_scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(family.noise_scheduler.alphas_cumprod, expected.alphas_cumprod, rtol=0, atol=0)


def test_resolution_is_the_models_own_or_a_multiple_of_the_vaes_factor(family: StableDiffusion) -> None:
    assert (family.own_resolution, family.check_size(32, "resolution")) == (16, 32)
    with pytest.raises(InputError, match="--resolution must be a multiple of 2 on this model, got 33"):
        family.check_size(33, "resolution")


def test_prompts_that_are_too_long_are_named_with_their_counts(family: StableDiffusion) -> None:
    fits, long, longer = ("a" + " b" * n for n in (MAX_TOKENS - 3, MAX_TOKENS - 2, MAX_TOKENS))
    family.check_prompts([fits])
    with pytest.raises(InputError) as error:
        family.check_prompts([fits, long, longer])
    assert str(error.value).splitlines() == [
        f"the tokenizer takes {MAX_TOKENS} tokens (start and end included), and the rest would be lost:",
        f"  {long!r} has {MAX_TOKENS + 1} tokens",
        f"  {longer!r} has {MAX_TOKENS + 3} tokens",
    ]


def test_an_unknown_prediction_type_is_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(InputError, match="prediction_type must be of epsilon, v_prediction, sample, got 'flow'"):
        stable_diffusion(pipeline)


def test_a_conditioned_unet_is_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(InputError, match="the unet takes 9 channels and the latents have 4"):
        stable_diffusion(pipeline)
