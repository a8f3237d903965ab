"""The loss of Stable Diffusion, against naive loops."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler
from settings import InputError
from stable_diffusion import StableDiffusion, dreambooth_loss
from tiny_sd import MAX_TOKENS, tiny_pipeline

SHAPE = (6, 3, 5, 4)


def random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def family() -> StableDiffusion:
    return StableDiffusion(tiny_pipeline())


# Prior preservation


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prior", [None, 0.3])
def test_the_loss_equals_a_loop_over_pictures(weighted: bool, prior: float | None) -> None:
    prediction, target = random(0), random(1)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0, 0.7]) if weighted else None
    errors = []
    for b in range(6):
        error = ((prediction[b] - target[b]) ** 2).sum() / (3 * 5 * 4)
        errors.append(error * (weights[b] if weighted else 1.0))
    expected = sum(errors) / 6 if prior is None else sum(errors[:3]) / 3 + prior * sum(errors[3:]) / 3
    # sums of 360 float32 in another order
    torch.testing.assert_close(dreambooth_loss(prediction, target, weights, prior), expected, rtol=1e-5, atol=0)


def test_a_prior_weight_of_zero_leaves_the_subjects_half() -> None:
    prediction, target = random(0), random(1)
    loss = dreambooth_loss(prediction, target, None, 0.0)
    torch.testing.assert_close(loss, dreambooth_loss(prediction[:3], target[:3]), rtol=0, atol=0)


def test_an_odd_batch_has_no_halves() -> None:
    with pytest.raises(ValueError, match="must be even, got 5"):
        dreambooth_loss(random(0)[:5], random(1)[:5], None, 1.0)


def test_the_loss_is_taken_in_float32() -> None:
    prediction, target = random(0).bfloat16(), random(1).bfloat16()
    expected = dreambooth_loss(prediction.double().float(), target.double().float())
    torch.testing.assert_close(dreambooth_loss(prediction, target), expected, rtol=0, atol=0)


# Targets and weights


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_answer_of_each_prediction_type_has_no_loss(kind: str) -> None:
    family = StableDiffusion(tiny_pipeline(kind))
    seen = {}

    def perfect(noisy: torch.Tensor, timesteps: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        signal = family.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        latents = seen["latents"]
        noise = (noisy - signal.sqrt() * latents) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        return ({"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind],)

    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    seen["latents"] = family.encode_images(pixels, [torch.Generator().manual_seed(seed) for seed in (7, 8)])
    loss = family.loss(perfect, pixels, family.encode_prompts(["a", "b"]), [7, 8])
    assert loss < 1e-6  # noise is got back by a division by sqrt(1 - a_t) >= 0.03, in float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_picture_itself(kind: str) -> None:
    family = StableDiffusion(tiny_pipeline(kind))
    timesteps = torch.tensor([0, 100, 400, 700, 999])
    weights = family.min_snr_weights(timesteps, gamma=5.0)
    for t, weight in zip(timesteps.tolist(), weights.tolist()):
        signal = family.noise_scheduler.alphas_cumprod[t].double().item()
        snr = signal / (1 - signal)
        # || error of x0 ||^2 is || error of the prediction ||^2 times this
        to_picture = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": 1.0}[kind]
        assert weight == pytest.approx(min(snr, 5.0) * to_picture, rel=1e-4)  # float32 of alphas_cumprod near 1


def test_min_snr_is_finite_where_no_signal_is_left() -> None:
    for kind in ("epsilon", "v_prediction"):
        pipeline = tiny_pipeline(kind)
        pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True)
        family = StableDiffusion(pipeline)
        assert torch.isfinite(family.min_snr_weights(torch.tensor([999]), 5.0)).all()


def test_the_loss_of_a_picture_does_not_depend_on_its_batch(family: StableDiffusion) -> None:
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    embeddings = family.encode_prompts(["a", "b", "c"])
    with torch.no_grad():
        together = family.loss(family.denoiser, pixels, embeddings, [3, 4, 5])
        alone = [family.loss(family.denoiser, pixels[i : i + 1], embeddings[i : i + 1], [3 + i]) for i in range(3)]
    # other sizes, other order of summation
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=0)


def test_timesteps_cover_the_schedule(family: StableDiffusion) -> None:
    seen = []

    def note(noisy: torch.Tensor, timesteps: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        seen.extend(timesteps.tolist())
        return (noisy,)

    pixels = torch.zeros(50, 3, 16, 16)
    for start in range(0, 500, 50):
        family.loss(note, pixels, family.encode_prompts(["a"]), list(range(start, start + 50)))
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
    latents = StableDiffusion(pipeline).encode_images(torch.rand(2, 3, 16, 16), [torch.Generator()] * 2)
    assert latents.shape == (2, 4, 8, 8)


def test_any_sampling_scheduler_gives_the_training_schedule() -> None:
    pipeline = tiny_pipeline("v_prediction")
    expected = StableDiffusion(pipeline).noise_scheduler
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    family = StableDiffusion(pipeline)
    assert family.noise_scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(family.noise_scheduler.alphas_cumprod, expected.alphas_cumprod, rtol=0, atol=0)


def test_resolution_is_the_models_own_or_a_multiple_of_the_vaes_factor(family: StableDiffusion) -> None:
    assert [family.resolution(asked) for asked in (None, 32)] == [16, 32]
    with pytest.raises(InputError, match="--resolution must be a multiple of 2 on this model, got 33"):
        family.resolution(33)


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
        StableDiffusion(pipeline)


def test_a_conditioned_unet_is_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(InputError, match="the UNet takes 9 channels and the VAE gives 4"):
        StableDiffusion(pipeline)
