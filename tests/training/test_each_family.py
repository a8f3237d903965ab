"""What is particular to each family of models, and training each from end to end.

Their conventions are checked against their pipelines: what a pipeline asks its denoiser, and makes of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from hosts import visible
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import FAMILIES as NAMES
from tiny_models import SIDE, call_settings, tiny_pipeline
from tiny_sd import MAX_TOKENS
from torch import Tensor
from transformers.models.t5 import modeling_t5

from coeff_diffusers import add_coeff_adapter, coeff_parameters, load_coeff_weights
from coeff_diffusers.training.adapters import add_adapters
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families import FAMILIES, DiffusionFamily, Family
from coeff_diffusers.training.results.validation import decoding_without_autocast
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.memory import release_frozen_text_encoders, release_text_encoders
from coeff_diffusers.training.settings.dreambooth import DreamBoothSettings

PACKED = ("FluxPipeline", "Flux2KleinPipeline", "QwenImagePipeline")  # they hold latents as (B, tokens, channels)
REVERSED = ("ZImagePipeline", "Lumina2Pipeline")  # their transformers' time runs from noise to the image
CLIP_ONLY = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
SCHNELL = "FLUX.1 schnell"  # which is told no guidance scale
EDM = ("EDM epsilon", "EDM v_prediction")  # Stable Diffusion XL with such a scheduler
OF_LENGTH = tuple(name for name in NAMES if name not in CLIP_ONLY)  # whose prompts' length can be chosen
TRAINABLE_TEXT = {  # pipeline -> the text encoders that train, and whether a LoRA can be on them
    "StableDiffusionPipeline": ({"text_encoder"}, True),
    "StableDiffusionXLPipeline": ({"text_encoder", "text_encoder_2"}, True),
    "StableDiffusion3Pipeline": ({"text_encoder", "text_encoder_2"}, True),
    "FluxPipeline": ({"text_encoder"}, True),
}
CAPPED = ("SanaPipeline", "Lumina2Pipeline")  # Gemma 2 caps its scores, which no sdpa does
ON_T5 = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")  # alone, without CLIP
T5_IS_OLD = not hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS")  # as in transformers 5.2: no attention to choose
PROMPTS = ["a fox", "two grey cats"]


def make_pipeline(name: str) -> Any:
    pipeline: Any = tiny_pipeline(
        {SCHNELL: "FluxPipeline"}.get(name, "StableDiffusionXLPipeline" if name in EDM else name)
    )
    if name == SCHNELL:
        config = {**pipeline.transformer.config, "guidance_embeds": False}
        pipeline.register_modules(transformer=visible(FluxTransformer2DModel.from_config(config)))
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    if name in EDM:  # as Playground 2.5
        kind = EDMDPMSolverMultistepScheduler if name == "EDM epsilon" else EDMEulerScheduler
        pipeline.scheduler = kind(prediction_type=name.removeprefix("EDM "))
        pipeline.vae.register_to_config(latents_mean=[-1.6, 1.1, 0.2, 3.4], latents_std=[8.4, 5.9, 6.9, 5.1])
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def make_family(pipeline: Any, **changes: Any) -> Any:
    kind = next(family for family in FAMILIES if type(pipeline).__name__ in family.supported)
    given = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "instance_prompt": "a"}
    return kind(pipeline, DreamBoothSettings(**given, **changes))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family(name: str) -> Any:
    return make_family(make_pipeline(name))


def call(pipeline: Any, prompts: list[str] = PROMPTS, **changes: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    settings = call_settings(type(pipeline).__name__, **changes)
    return pipeline(prompt=list(prompts), generator=generators, **settings).images  # Z-Image writes into the list


def pixels(count: int = 2, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def sizes_of(height: int, width: int, count: int = 2) -> Tensor:
    return torch.tensor([[height, width, 0, 0, height, width]] * count)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def packed(name: str, latents: Tensor) -> Tensor:
    """Latents (B, C, height, width) as the pipeline holds them; FLUX.2's come as channels of patches."""
    if name in PACKED and name != "Flux2KleinPipeline":
        latents = torch.nn.functional.pixel_unshuffle(latents, 2)
    return latents.flatten(2).mT if name in PACKED else latents


@contextmanager
def noted_steps(scheduler: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What a scheduler gets at each step, and what it had made of the latents for the denoiser."""
    original, steps = scheduler.step, []

    def step(answer: Tensor, timestep: Tensor, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
        steps.append((answer, timestep, scale(latents, timestep)))
        return original(answer, timestep, latents, *args, **kwargs)

    scheduler.step = step
    yield steps
    scheduler.step = original


# Conventions


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, *EDM, SCHNELL])
def test_the_answer_is_the_one_that_the_pipeline_takes(name: str) -> None:
    """Latents, timestep and prompt of each step of the pipeline, given to the family, get what its scheduler got."""
    pipeline, (height, width) = make_pipeline(name), (SIDE, 2 * SIDE)
    family = make_family(pipeline)
    changes: dict[str, Any] = {"height": height, "width": width}
    sizes = sizes_of(height, width)
    if name in (*EDM, "StableDiffusionXLPipeline"):
        changes |= {"original_size": (50, 40), "crops_coords_top_left": (3, 7), "target_size": (30, 60)}
        sizes = torch.tensor([[50, 40, 3, 7, 30, 60]] * 2)
    if name not in (
        "FluxPipeline",
        SCHNELL,
        "QwenImagePipeline",
    ):  # without guidance the denoiser is asked once a step
        changes["guidance_scale"] = 0.0 if name == "ZImagePipeline" else 1.0
    with noted_steps(pipeline.scheduler) as steps:
        call(pipeline, **changes)
    conditions = family.conditions(PROMPTS)
    shape = family.sample_latents(family.encode_images(pixels(2, height, width)), generators(0, 1)).shape
    # where each number of the family's latents stands in the pipeline's
    places = packed(type(pipeline).__name__, torch.arange(shape.numel()).view(shape)).flatten().argsort()
    assert len(steps) == 2
    for answer, timestep, noisy in steps:
        mine = noisy.flatten()[places].view(shape)
        prediction = family.predict(family.denoiser, mine, timestep.expand(2), conditions, sizes)
        torch.testing.assert_close(packed(type(pipeline).__name__, prediction), answer)


def perfect_answer(name: str, family: Any, noisy: Tensor, timesteps: Tensor, clean: Tensor) -> Tensor:
    """What a denoiser answers that knows the image."""
    timesteps = timesteps.reshape(-1, *[1] * (noisy.ndim - 1))
    if name in EDM:
        # (the paper's table 1) D = c_skip x + c_out F(c_in x, log(sigma) / 4)
        sigma = (4 * timesteps).exp()
        root = (sigma**2 + 0.25).sqrt()
        answer = (clean - 0.25 / root**2 * noisy * root) / (sigma * 0.5 / root)
        return -answer if name == "EDM v_prediction" else answer
    if isinstance(family, DiffusionFamily):
        signal = family.noise_scheduler.alphas_cumprod[timesteps.long()]
        noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
        return torch.cat([noise, noise], dim=1) if name.startswith("PixArt") else noise
    sigma = timesteps / 1000 if name in ("StableDiffusion3Pipeline", "SanaPipeline") else timesteps
    if name in REVERSED:
        return (clean - noisy) / (1 - sigma)
    return (noisy - clean) / sigma


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, *EDM])
def test_a_denoiser_that_paints_the_image_has_no_loss(name: str) -> None:
    """One perfect denoiser: by it the pipeline paints an image, and the errors on that image are zero."""
    pipeline = make_pipeline(name)
    if name == "StableDiffusionPipeline":  # whose solver leaves the noise of the first timestep
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    family = make_family(pipeline)
    moments = family.encode_images(pixels())
    moments[:, 1] = 0.0
    latents = family.sample_latents(moments, generators(3, 4))
    goal = packed(name, latents)

    def perfect(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        asked, timesteps = (kwargs.get("hidden_states", *args[:1]), kwargs.get("timestep", *args[1:2]))
        noisy = torch.stack(asked).squeeze(2) if isinstance(asked, list) else asked
        clean = goal.repeat(len(noisy) // 2, *[1] * (goal.ndim - 1))  # with guidance, without prompts as well
        answer = perfect_answer(name, family, noisy, timesteps.expand(len(noisy)), clean)
        return ([each.unsqueeze(1) for each in answer] if isinstance(asked, list) else answer,)

    with family.denoiser.register_forward_hook(perfect, with_kwargs=True):
        painted = call(pipeline, num_inference_steps=4)
        conditions, sizes = family.conditions(PROMPTS), sizes_of(SIDE, SIDE)
        errors = family.errors(family.denoiser, latents, conditions, sizes, generators(3, 4))
    assert errors.max() < 1e-5  # rounding of float32
    means = moments[:, 0].unsqueeze(2) if name == "QwenImagePipeline" else moments[:, 0]
    decoded = pipeline.vae.decode(means, return_dict=False)[0]
    expected = pipeline.image_processor.postprocess(
        decoded[:, :, 0] if name == "QwenImagePipeline" else decoded, output_type="np"
    )
    # Sana's solver rounds timesteps to whole numbers, and sigma by up to 1e-3
    np.testing.assert_allclose(painted, expected, atol=5e-2 if name == "SanaPipeline" else 1e-3)


def test_training_visits_the_noise_that_sanas_solver_shifts_to() -> None:
    pipeline = make_pipeline("SanaPipeline")
    family = make_family(pipeline)
    pipeline.scheduler.set_timesteps(1000)
    sigmas = pipeline.scheduler.sigmas[:-1]
    # its 1000 steps and those of training start at 0.999 and at 1
    torch.testing.assert_close(family.noise_scheduler.sigmas, sigmas, atol=2e-3, rtol=0)


@torch.no_grad()
def test_errors_do_not_depend_on_the_length_of_other_prompts(family: Any) -> None:
    moments = family.encode_images(pixels())

    def errors(chosen: list[int]) -> Tensor:
        drawn = generators(*chosen)
        latents = family.sample_latents(moments[chosen], drawn)
        conditions = family.conditions([PROMPTS[i] for i in chosen])
        return family.errors(family.denoiser, latents, conditions, sizes_of(SIDE, SIDE, len(chosen)), drawn)

    # other sizes, other order of summation
    torch.testing.assert_close(errors([0, 1]), torch.cat([errors([0]), errors([1])]), rtol=1e-3, atol=0)


def test_checkpointed_gradients_are_the_same(family: Any) -> None:
    add_coeff_adapter(family.denoiser)
    latents = family.sample_latents(family.encode_images(pixels()), generators(0, 1))
    conditions = family.conditions(PROMPTS)

    def gradients() -> list[Tensor]:
        errors = family.errors(family.denoiser, latents, conditions, sizes_of(SIDE, SIDE), generators(5, 6))
        return list(torch.autograd.grad(errors.mean(), list(coeff_parameters(family.denoiser))))

    family.denoiser.train()
    expected = gradients()
    family.denoiser.enable_gradient_checkpointing()
    for gradient, other in zip(gradients(), expected, strict=True):
        assert gradient.abs().min() > 0
        torch.testing.assert_close(gradient, other)


def test_all_that_trains_has_a_gradient(name: str) -> None:
    """As averaging over processes needs it, which waits for each."""
    trained_text = name not in CAPPED and not (name in ON_T5 and T5_IS_OLD)
    lora = 2 if not trained_text or TRAINABLE_TEXT.get(name, ((), False))[1] else 0
    family = make_family(make_pipeline(name), train_text_encoder=trained_text, lora_rank=lora)
    parameters = add_adapters(family, family.settings, PROMPTS[0])
    latents = family.sample_latents(family.encode_images(pixels()), generators(0, 1))
    conditions = family.conditions(PROMPTS)
    family.errors(family.denoiser, latents, conditions, sizes_of(SIDE, SIDE), generators(0, 1)).sum().backward()
    assert len(parameters) == 1 + trained_text + (lora > 0) + (lora > 0 and trained_text)
    assert all(parameter.grad is not None for group in parameters.values() for parameter in group)


@torch.no_grad()
def test_preconditioned_outputs_measure_the_image() -> None:
    pipeline = make_pipeline("StableDiffusion3Pipeline")
    seen: dict[str, Tensor] = {}

    def note(hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        seen["noisy"], seen["sigma"] = hidden_states, timestep.view(-1, 1, 1, 1) / 1000
        return (hidden_states,)

    family = make_family(pipeline, precondition_outputs=True)
    latents = family.sample_latents(family.encode_images(pixels()), generators(0, 1))
    conditions, sizes = family.conditions(PROMPTS), sizes_of(SIDE, SIDE)
    errors = family.errors(note, latents, conditions, sizes, generators(5, 6))
    image = seen["noisy"] - seen["sigma"] * seen["noisy"]
    torch.testing.assert_close(errors, (image - latents).square().mean((1, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize(("given", "told"), [({}, 3.5), ({"guidance_scale": 1.0}, 1.0)])
def test_flux_is_told_the_guidance_scale(given: dict[str, float], told: float) -> None:
    family = make_family(make_pipeline("FluxPipeline"), **given)
    seen: list[Tensor] = []

    def note(hidden_states: Tensor, guidance: Tensor, **kwargs: Any) -> tuple[Tensor]:
        seen.append(guidance)
        return (hidden_states,)

    latents = family.sample_latents(family.encode_images(pixels()), generators(0, 1))
    family.errors(note, latents, family.conditions(PROMPTS), sizes_of(SIDE, SIDE), generators(5, 6))
    assert seen[0].tolist() == [told, told]


@torch.no_grad()
def test_a_vae_that_overflows_in_float16_encodes_in_float32() -> None:
    pipeline = make_pipeline("StableDiffusionXLPipeline")
    family = make_family(pipeline)
    pipeline.vae.half()
    moments = family.encode_images(pixels() * 1e5)
    assert moments.isfinite().all()
    assert pipeline.vae.dtype == torch.float16
    torch.testing.assert_close(moments, _encoded(pipeline.vae.float(), pixels() * 1e5))


@torch.no_grad()
def test_a_vae_that_overflows_in_float16_decodes_in_float32_under_autocast() -> None:
    pipeline = make_pipeline("StableDiffusionXLPipeline")
    pipeline.vae.decoder.conv_in.weight.mul_(3e3)
    vae, seen = pipeline.vae.half(), []
    vae.decoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with decoding_without_autocast(vae), torch.autocast("cpu", dtype=torch.float16):
        vae.float()  # as the pipeline does before it decodes
        decoded = vae.decode(torch.randn(1, 4, 8, 8, dtype=torch.float16)).sample
    assert decoded.isfinite().all()
    assert seen == [torch.float32]
    assert "decode" not in vars(vae)


def _encoded(vae: Any, images: Tensor) -> Tensor:
    distribution = vae.encode(images).latent_dist
    return torch.stack([distribution.mean, distribution.std], dim=1)


# Prompts


def test_prompts_that_lose_their_end_are_refused_and_others_are_not(name: str, family: Any) -> None:
    limits = family.token_limits()
    longest = max(limits, key=lambda tokenizer: limits[tokenizer])
    tokenizer = getattr(family.pipeline, longest)

    def ids(prompt: str) -> Tensor:
        return tokenizer(family.tokenized_text(prompt), return_tensors="pt").input_ids

    fits = "a" * (limits[longest] - ids("a").shape[1] + 1)
    family.check_prompts([fits])
    with pytest.raises(InputError, match=f"'{fits}a' has {limits[longest] + 1} tokens"):
        family.check_prompts([fits, fits + "a"])

    seen: list[Tensor] = []
    encoder = getattr(family.pipeline, longest.replace("tokenizer", "text_encoder"))
    hook = lambda module, args, kwargs: seen.append(kwargs.get("input_ids", *args[:1]))  # noqa: E731
    with encoder.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        _, told, crop = (family.encode_prompts([prompt])[0]["prompt_embeds"] for prompt in ("fox", fits, fits + "a"))
    short = ids("fox")
    assert torch.equal(seen[0][:, : short.shape[1]], short)
    assert torch.equal(seen[1], ids(fits))
    assert crop.shape == told.shape
    if name != "QwenImagePipeline":  # which cuts prompts after its encoder
        assert seen[2].shape == seen[1].shape


@pytest.mark.parametrize("name", OF_LENGTH)
def test_the_length_of_prompts_can_be_chosen(name: str) -> None:
    pipeline = make_pipeline(name)
    default, chosen = make_family(pipeline), make_family(pipeline, max_sequence_length=240)
    assert chosen.call_arguments(PROMPTS)["max_sequence_length"] == 240
    templates = [max(family.token_limits().values()) - family.max_sequence_length for family in (default, chosen)]
    assert templates[0] == templates[1]
    others = MAX_TOKENS if name == "StableDiffusion3Pipeline" else 0  # of CLIP's
    for family in (default, chosen):
        with torch.no_grad():
            [conditions] = family.encode_prompts(["a" * (240 + templates[1])])  # with its template, more than that
        tokens = int(conditions["mask"].sum()) if "mask" in conditions else len(conditions["prompt_embeds"])
        assert (tokens - others == 240) == (family is chosen)


@pytest.mark.parametrize("name", CLIP_ONLY)
def test_the_length_of_clips_prompts_is_no_choice(name: str) -> None:
    with pytest.raises(InputError, match="--max_sequence_length: the text encoders of this model take one number"):
        make_family(make_pipeline(name), max_sequence_length=64)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("StableDiffusion3Pipeline", 512),
        ("FluxPipeline", 512),
        ("QwenImagePipeline", 1024),
        ("Lumina2Pipeline", 512),
    ],
)
def test_more_tokens_than_the_pipeline_takes_are_refused(name: str, most: int) -> None:
    pipeline = make_pipeline(name)
    make_family(pipeline, max_sequence_length=most)
    with pytest.raises(
        InputError, match=f"--max_sequence_length must be {most} at most on this model, got {most + 1}"
    ):
        make_family(pipeline, max_sequence_length=most + 1)
    with pytest.raises(ValueError, match=str(most)):
        call(pipeline, max_sequence_length=most + 1)


def test_encoding_leaves_the_prompts_as_they_are(family: Any) -> None:
    prompts = list(PROMPTS)
    family.encode_prompts(prompts)
    assert prompts == PROMPTS


def test_released_text_encoders_are_not_needed(family: Family) -> None:
    pipeline, before = family.pipeline, call(family.pipeline)
    assert release_text_encoders(family, [lambda: call(pipeline)]) == list(family.text_encoder_names)
    assert not any(name.startswith("text_encoder") and part is not None for name, part in pipeline.components.items())
    np.testing.assert_array_equal(call(pipeline), before)


@torch.no_grad()
def test_a_dropped_caption_is_what_the_pipeline_guides_away_from(name: str, family: Any) -> None:
    """Without a negative prompt, or with that of the pipeline's own example."""
    rows: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        states = args[2] if name == "ZImagePipeline" else told["encoder_hidden_states"]
        masks = told.get("encoder_attention_mask", told.get("encoder_hidden_states_mask"))
        rows.extend(states if masks is None else [row[mask.bool()] for row, mask in zip(states, masks)])

    hook = family.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    guided: dict[str, Any] = {"guidance_scale": 3.0}
    if name in ("QwenImagePipeline", "FluxPipeline"):
        guided = {"true_cfg_scale": 3.0, "negative_prompt": " " if name == "QwenImagePipeline" else ""}
    call(family.pipeline, PROMPTS[:1], num_inference_steps=2, **guided)
    hook.remove()
    conditions = family.conditions([""])
    [dropped] = conditions["prompt_embeds"]
    if "mask" in conditions:
        dropped = dropped[conditions["mask"][0].bool()]
    found = [row for row in rows if row.shape == dropped.shape and torch.equal(row, dropped)]
    assert found
    assert len(found) < len(rows)


def test_the_empty_prompt_keeps_its_place_in_a_batch(family: Any) -> None:
    together = family.conditions([PROMPTS[0], "", PROMPTS[1]])
    for row, prompt in enumerate([PROMPTS[0], "", PROMPTS[1]]):
        alone = family.conditions([prompt])
        for key, value in alone.items():
            # padded to the longest, and encoded in a batch of another size
            part = together[key][row][: value.shape[1]] if value.ndim > 1 else together[key][row]
            torch.testing.assert_close(part, value[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_text_encoders_that_do_not_train_are_released_and_their_answers_kept(name: str) -> None:
    pipeline = make_pipeline(name)
    family = make_family(pipeline)
    before, expected = call(pipeline), family.conditions(PROMPTS)
    family.trained_text_encoders = [
        getattr(pipeline, part)
        for part in ("text_encoder", "text_encoder_2")
        if "CLIP" in type(getattr(pipeline, part)).__name__
    ]
    t5 = "text_encoder_3" if name == "StableDiffusion3Pipeline" else "text_encoder_2"
    count = sum(p.numel() for p in getattr(pipeline, t5).parameters())
    assert count
    release_frozen_text_encoders(family, PROMPTS, [lambda: call(pipeline)])
    assert sum(p.numel() for p in getattr(pipeline, t5).parameters()) == 0
    for key, value in family.conditions(PROMPTS).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)  # rows are encoded one by one
    np.testing.assert_allclose(call(pipeline), before, atol=1e-3)
    with pytest.raises(RuntimeError, match="a text encoder that does not train was released"):
        family.conditions(["a prompt that nobody knows"])


def test_pipelines_without_their_optional_text_encoders_are_trained(
    tmp_path: Path, train: Callable[..., TrainingResult]
) -> None:
    for name, parts in {
        "StableDiffusionXLPipeline": ("text_encoder", "tokenizer"),
        "StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3"),
    }.items():
        pipeline: Any = tiny_pipeline(name)
        pipeline.register_modules(**dict.fromkeys(parts))
        if name == "StableDiffusionXLPipeline":  # it has the width of both encoders
            pipeline.unet = visible(_unet_of_one_encoder(pipeline))
        pipeline.save_pretrained(tmp_path / name)
        train(pretrained_model_name_or_path=tmp_path / name, output_dir=tmp_path / f"{name}-out", resolution=SIDE)
        with pytest.raises(InputError, match=r"the tokenizer takes \d+ tokens"):
            train(
                pretrained_model_name_or_path=tmp_path / name,
                output_dir=tmp_path / "long",
                resolution=SIDE,
                instance_prompt="a fox " * 300,
            )


def _unet_of_one_encoder(pipeline: Any) -> Any:
    width = pipeline.text_encoder_2.config.hidden_size
    torch.manual_seed(0)
    return type(pipeline.unet).from_config({**pipeline.unet.config, "cross_attention_dim": width})


# Models


def test_sizes(name: str, family: Any) -> None:
    own, multiple = {
        "StableDiffusionPipeline": (16, 2),
        "StableDiffusionXLPipeline": (32, 8),
        "StableDiffusion3Pipeline": (32, 4),
        "FluxPipeline": (256, 4),
        "PixArtAlphaPipeline": (256, 8),
        "PixArtSigmaPipeline": (32, 8),
        "Flux2KleinPipeline": (256, 4),
        "QwenImagePipeline": (256, 4),
        "ZImagePipeline": (1024, 4),
        "SanaPipeline": (128, 32),
        "Lumina2Pipeline": (32, 16),
    }[name]
    assert (family.own_resolution, family.size_multiple) == (own, multiple)
    with pytest.raises(InputError, match=f"--resolution must be a multiple of {multiple} on this model"):
        family.check_size(SIDE + multiple // 2, "resolution")


def test_images_beyond_the_positions_of_stable_diffusion_3_are_refused() -> None:
    family = make_family(make_pipeline("StableDiffusion3Pipeline"))
    assert family.check_size(96, "resolution") == 96  # 24 positions of 4 pixels
    with pytest.raises(InputError, match="--resolution must be 96 at most on this model, .*, got 100"):
        family.check_size(100, "resolution")
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        call(family.pipeline, height=100)


def test_denoisers_of_more_channels_are_refused(name: str) -> None:
    pipeline = make_pipeline(name)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    channels = denoiser.config.in_channels
    denoiser.register_to_config(in_channels=2 * channels)
    with pytest.raises(InputError, match=f"takes {2 * channels} channels and the latents have {channels}"):
        make_family(pipeline)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("QwenImagePipeline", {"guidance_embeds": True}),
        ("StableDiffusionPipeline", {"time_cond_proj_dim": 8}),
        ("StableDiffusionXLPipeline", {"time_cond_proj_dim": 8}),
    ],
)
def test_denoisers_distilled_to_take_the_guidance_scale_are_refused(name: str, config: dict[str, Any]) -> None:
    pipeline = make_pipeline(name)
    (getattr(pipeline, "unet", None) or pipeline.transformer).register_to_config(**config)
    with pytest.raises(InputError, match="distilled to take the guidance scale"):
        make_family(pipeline)


@pytest.mark.parametrize(
    ("name", "setting", "value", "why"),
    [
        ("ZImagePipeline", "snr_gamma", 5.0, "this model is trained by flow matching"),
        ("ZImagePipeline", "offset_noise", True, "this model is trained by flow matching"),
        ("EDM epsilon", "snr_gamma", 5.0, "one of EDM"),
        ("EDM epsilon", "offset_noise", True, "one of EDM"),
        ("PixArtSigmaPipeline", "precondition_outputs", True, "this model is not trained by flow matching"),
        ("PixArtSigmaPipeline", "weighting_scheme", "mode", "this model is not trained by flow matching"),
        ("StableDiffusion3Pipeline", "guidance_scale", 3.5, "does not take it as a condition"),
    ],
)
def test_settings_of_other_families_are_refused(name: str, setting: str, value: object, why: str) -> None:
    with pytest.raises(InputError, match=f"--{setting}.*: .*{why}"):
        make_family(make_pipeline(name), **{setting: value})


def test_sana_is_not_trained_in_float16() -> None:
    pipeline = make_pipeline("SanaPipeline")
    pipeline.transformer.half()
    with pytest.raises(InputError, match="--mixed_precision fp16: .* linear attention in float16"):
        make_family(pipeline)


def test_a_guidance_scale_for_a_flux_that_takes_none_is_refused() -> None:
    pipeline = make_pipeline("FluxPipeline")
    pipeline.transformer.register_to_config(guidance_embeds=False)
    assert make_family(pipeline).guided is False
    with pytest.raises(InputError, match=r"--guidance_scale: .* \[schnell\]"):
        make_family(pipeline, guidance_scale=3.5)


def test_a_scheduler_of_another_prediction_is_refused() -> None:
    pipeline = make_pipeline("SanaPipeline")
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(InputError, match="prediction_type must be flow_prediction, got 'epsilon'"):
        make_family(pipeline)


def test_a_distilled_klein_is_warned_of() -> None:
    pipeline = make_pipeline("Flux2KleinPipeline")
    pipeline.register_to_config(is_distilled=True)
    with pytest.warns(UserWarning, match="distilled to few steps"):
        make_family(pipeline)


# Training


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def saved(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / name
        if not folder.exists():
            tiny_pipeline(name).save_pretrained(folder)
        return folder

    return saved


def test_a_fresh_pipeline_with_the_files_of_a_run_paints_what_the_trained_one_did(
    name: str, folders: Callable[[str], Path], train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    length = 64 if name == "Flux2KleinPipeline" else None
    result = train(
        pretrained_model_name_or_path=folders(name),
        resolution=SIDE,
        max_sequence_length=length,
        lora_rank=2,
        lora_learning_rate=1e-2,
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a fox",
        num_class_images=2,
        validation_prompt=["two grey cats"],
        num_validation_images=2,
        validation_num_inference_steps=2,
    )
    assert {Image.open(path).size for path in (tmp_path / "class").iterdir()} == {(SIDE, SIDE)}
    assert result.coeff_file is not None
    assert result.lora_file is not None
    assert all((delta != 0).all() for delta in load_file(result.coeff_file).values())

    fresh: Any = DiffusionPipeline.from_pretrained(folders(name))
    fresh.set_progress_bar_config(disable=True)
    changes: dict[str, Any] = {} if length is None else {"max_sequence_length": length}
    if name == "QwenImagePipeline":
        changes["negative_prompt"] = " "  # which turns guidance on

    def paint() -> Any:
        return call(fresh, ["two grey cats"] * 2, **changes)

    base = paint()
    if name.startswith("PixArt"):  # for which diffusers has no loader
        PeftModel.from_pretrained(fresh.transformer, result.lora_file.parent)
        assert "PeftModel.from_pretrained(pipe.transformer," in result.model_card.read_text()
    else:
        fresh.load_lora_weights(result.lora_file.parent)
    with_lora = paint()
    load_coeff_weights(fresh, result.coeff_file.parent)
    both = paint()
    assert np.abs(with_lora - base).max() > 1e-2
    assert np.abs(both - with_lora).max() > 1e-2
    for image, path in zip(both, result.images[1:], strict=True):
        # rounded to whole levels, of weights that lie otherwise in memory
        np.testing.assert_allclose(image * 255, np.asarray(Image.open(path), dtype=np.float32), atol=2)


def test_training_in_bfloat16_with_cached_latents_leaves_coefficients_in_float32(
    name: str, folders: Callable[[str], Path], train: Callable[..., TrainingResult]
) -> None:
    result = train(
        pretrained_model_name_or_path=folders(name),
        resolution=SIDE,
        max_train_steps=1,
        mixed_precision="bf16",
        cache_latents=True,
        center_crop=True,
        validation_prompt=["a fox"],
        num_validation_images=1,
        validation_num_inference_steps=2,
    )
    assert result.coeff_file is not None
    for delta in load_file(result.coeff_file).values():
        assert delta.dtype == torch.float32
        assert (delta != 0).all()


@pytest.mark.parametrize("name", CAPPED)
def test_a_text_encoder_that_caps_its_scores_is_refused(
    name: str, folders: Callable[[str], Path], train: Callable[..., TrainingResult]
) -> None:
    with pytest.raises(InputError, match="--train_text_encoder: text_encoder: Gemma2Model caps its attention scores"):
        train(pretrained_model_name_or_path=folders(name), resolution=SIDE, train_text_encoder=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CAPPED])
def test_coefficients_on_the_text_encoders_train_and_load(
    name: str, folders: Callable[[str], Path], train: Callable[..., TrainingResult]
) -> None:
    if name in ON_T5 and T5_IS_OLD:
        with pytest.raises(InputError, match="T5EncoderModel does not take its attention through transformers'"):
            train(pretrained_model_name_or_path=folders(name), resolution=SIDE, train_text_encoder=True)
        return
    parts, with_lora = TRAINABLE_TEXT.get(name, ({"text_encoder"}, False))
    flags: dict[str, Any] = {"lora_rank": 2, "text_encoder_lora_lr": 1e-2} if with_lora else {}
    result = train(
        pretrained_model_name_or_path=folders(name),
        resolution=SIDE,
        max_sequence_length=64 if name == "Flux2KleinPipeline" else None,
        train_text_encoder=True,
        text_encoder_lr=0.1,
        max_train_steps=2,
        validation_prompt=["two grey cats"],
        num_validation_images=1,
        validation_num_inference_steps=2,
        **flags,
    )
    values = load_file(result.coeff_file)
    assert {key.partition(".")[0] for key in values if key.startswith("text_encoder")} == parts
    assert all(value.any() for value in values.values())
    fresh: Any = DiffusionPipeline.from_pretrained(folders(name))
    fresh.set_progress_bar_config(disable=True)
    if with_lora:
        fresh.load_lora_weights(result.lora_file.parent)
        assert {key.partition(".")[0] for key in load_file(result.lora_file)} > parts
    load_coeff_weights(fresh, result.coeff_file.parent)
    changes: dict[str, Any] = {"max_sequence_length": 64} if name == "Flux2KleinPipeline" else {}
    if name == "QwenImagePipeline":
        changes["negative_prompt"] = " "  # which turns guidance on
    [image] = call(fresh, ["two grey cats"], **changes)
    # rounded to whole levels, of weights that lie otherwise in memory
    np.testing.assert_allclose(image * 255, np.asarray(Image.open(result.images[1]), dtype=np.float32), atol=2)
