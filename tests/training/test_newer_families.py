"""FLUX.2 [klein], Qwen-Image, Z-Image, Sana and Lumina 2: what is particular to them, and training from end to end.

Their conventions are checked against their pipelines: what a pipeline asks its transformer, and makes of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES, Family
from memory import release_text_encoders
from PIL import Image
from safetensors.torch import load_file
from settings import DreamBoothSettings, InputError
from tiny_models import SIDE, call_settings, tiny_pipeline
from torch import Tensor
from train_dreambooth import TrainingResult

from coeff_diffusers import add_coeff_adapter, coeff_parameters, load_coeff_weights

NAMES = ("Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline", "SanaPipeline", "Lumina2Pipeline")
PACKED = ("Flux2KleinPipeline", "QwenImagePipeline")  # their transformers take (B, tokens, channels)
REVERSED = ("ZImagePipeline", "Lumina2Pipeline")  # their transformers' time runs from noise to the picture
SIZES = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)
PROMPTS = ["a fox", "two grey cats"]


def make_family(pipeline: Any, **changes: Any) -> Family:
    kind = next(family for family in FAMILIES if type(pipeline).__name__ in family.supported)
    given = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "a"}
    return kind(pipeline, DreamBoothSettings(**given, **changes))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family(name: str) -> Family:
    pipeline: Any = tiny_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return make_family(pipeline)


def call(pipeline: Any, prompts: list[str] = PROMPTS, **changes: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    settings = call_settings(type(pipeline).__name__, **changes)
    return pipeline(prompt=list(prompts), generator=generators, **settings).images  # Z-Image writes into the list


def unguided(name: str) -> dict[str, float]:
    """Arguments for a call that asks the transformer once a step, for the prompt alone."""
    return {} if name == "QwenImagePipeline" else {"guidance_scale": 0.0 if name == "ZImagePipeline" else 1.0}


def packed(name: str, latents: Tensor) -> Tensor:
    """Latents (B, C, height, width) as the pipeline holds them, channels of a patch together for Qwen-Image."""
    if name == "QwenImagePipeline":
        latents = torch.nn.functional.pixel_unshuffle(latents, 2)
    return latents.flatten(2).mT if name in PACKED else latents


@contextmanager
def noted(module: Any, attribute: str) -> Iterator[list[SimpleNamespace]]:
    """Notes the calls of a method."""
    original, calls = getattr(module, attribute), []

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append(SimpleNamespace(args=args, kwargs=kwargs))
        return original(*args, **kwargs)

    setattr(module, attribute, note)
    yield calls
    setattr(module, attribute, original)


# Conventions


@torch.no_grad()
def test_the_velocity_is_the_one_that_the_pipeline_takes(name: str, family: Family) -> None:
    """Latents, timestep and prompt of each step of the pipeline, given to the family, get what its scheduler got.

    Of a wide picture, so that height and width are told apart.
    """
    width = 2 * SIDE
    with noted(family.pipeline.scheduler, "step") as steps:
        call(family.pipeline, width=width, **unguided(name))
    conditions = family.conditions(PROMPTS)
    shape = family.sample_latents(family.encode_images(torch.zeros(2, 3, SIDE, width)), [torch.Generator()] * 2).shape
    # where each number of the family's latents stands in the pipeline's
    places = packed(name, torch.arange(shape.numel()).view(shape)).flatten().argsort()
    sizes = torch.tensor([[SIDE, width, 0, 0, SIDE, width]] * 2)
    assert len(steps) == 2
    for velocity, timestep, noisy in (step.args for step in steps):
        mine = noisy.flatten()[places].view(shape)
        prediction = family.predict(family.denoiser, mine, timestep.expand(2), conditions, sizes)
        torch.testing.assert_close(packed(name, prediction), velocity)


@torch.no_grad()
def test_a_transformer_that_paints_the_picture_has_no_loss(name: str, family: Family) -> None:
    """One perfect transformer: by it the pipeline paints a picture, and the errors on that picture are zero."""
    pipeline = family.pipeline
    moments = family.encode_images(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    moments[:, 1] = 0.0
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    latents = family.sample_latents(moments, generators)
    goal = packed(name, latents)

    def perfect(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        asked, timestep = (kwargs.get("hidden_states", *args[:1]), kwargs.get("timestep", *args[1:2]))
        noisy = torch.stack(asked).squeeze(2) if isinstance(asked, list) else asked
        sigma = timestep / 1000 if name == "SanaPipeline" else 1 - timestep if name in REVERSED else timestep
        times = len(noisy) // 2  # with guidance, pictures without prompt beside those with it
        clean = goal.repeat(times, *[1] * (goal.ndim - 1))
        velocity = (noisy - clean) / sigma.view(-1, *[1] * (goal.ndim - 1))
        answer = -velocity if name in REVERSED else velocity
        return ([each.unsqueeze(1) for each in answer] if isinstance(asked, list) else answer,)

    with family.denoiser.register_forward_hook(perfect, with_kwargs=True):
        painted = call(pipeline, num_inference_steps=4)
        errors = family.errors(family.denoiser, latents, family.conditions(PROMPTS), SIZES, generators)
    assert errors.max() < 1e-6  # rounding of float32
    means = moments[:, 0].unsqueeze(2) if name == "QwenImagePipeline" else moments[:, 0]
    decoded = pipeline.vae.decode(means, return_dict=False)[0]
    expected = pipeline.image_processor.postprocess(
        decoded[:, :, 0] if name == "QwenImagePipeline" else decoded, output_type="np"
    )
    # Sana's solver rounds timesteps to whole numbers, and sigma by up to 1e-3
    np.testing.assert_allclose(painted, expected, atol=5e-2 if name == "SanaPipeline" else 1e-4)


def test_training_visits_the_noise_that_the_pipeline_shifts_to() -> None:
    pipeline: Any = tiny_pipeline("SanaPipeline")
    family: Any = make_family(pipeline)
    pipeline.scheduler.set_timesteps(1000)
    sigmas = pipeline.scheduler.sigmas[:-1]
    # its 1000 steps and those of training start at 0.999 and at 1
    torch.testing.assert_close(family.noise_scheduler.sigmas, sigmas, atol=2e-3, rtol=0)


@torch.no_grad()
def test_errors_do_not_depend_on_the_length_of_other_prompts(family: Family) -> None:
    moments = family.encode_images(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1)

    def errors(chosen: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        latents = family.sample_latents(moments[chosen], generators)
        conditions = family.conditions([PROMPTS[i] for i in chosen])
        return family.errors(family.denoiser, latents, conditions, SIZES[chosen], generators)

    # other sizes, other order of summation
    torch.testing.assert_close(errors([0, 1]), torch.cat([errors([0]), errors([1])]), rtol=1e-3, atol=0)


def test_checkpointed_gradients_are_the_same(family: Family) -> None:
    add_coeff_adapter(family.pipeline)
    latents = family.sample_latents(
        family.encode_images(torch.zeros(2, 3, SIDE, SIDE)), [torch.Generator().manual_seed(s) for s in (0, 1)]
    )
    conditions = family.conditions(PROMPTS)

    def gradients() -> list[Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        loss = family.errors(family.denoiser, latents, conditions, SIZES, generators).mean()
        return list(torch.autograd.grad(loss, list(coeff_parameters(family.pipeline))))

    expected = gradients()
    family.denoiser.train()
    family.denoiser.enable_gradient_checkpointing()
    for gradient, other in zip(gradients(), expected, strict=True):
        assert gradient.abs().min() > 0
        torch.testing.assert_close(gradient, other)


# Prompts


def test_prompts_that_lose_their_end_are_refused_and_others_are_not(name: str, family: Family) -> None:
    tokenizer = family.pipeline.tokenizer
    free = family.token_limits()["tokenizer"] - len(tokenizer(family.tokenized_text("")).input_ids)
    prompts = ["a" * free, "a" * (free + 1)]
    family.check_prompts(prompts[:1])
    with pytest.raises(InputError, match=f"{prompts[1]!r} has {family.token_limits()['tokenizer'] + 1} tokens"):
        family.check_prompts(prompts)

    seen: list[Tensor] = []
    hook = lambda module, args, kwargs: seen.append(kwargs.get("input_ids", *args[:1]))  # noqa: E731
    with family.pipeline.text_encoder.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        told = [family.encode_prompts([prompt])[0]["prompt_embeds"] for prompt in prompts]
    whole = [tokenizer(family.tokenized_text(prompt), return_tensors="pt").input_ids for prompt in prompts]
    assert torch.equal(seen[0], whole[0])
    assert told[1].shape == told[0].shape
    if name != "QwenImagePipeline":  # which cuts prompts after its encoder
        assert seen[1].shape == whole[0].shape


def test_the_length_of_prompts_can_be_chosen(name: str) -> None:
    pipeline: Any = tiny_pipeline(name)
    default, chosen = make_family(pipeline), make_family(pipeline, max_sequence_length=240)
    assert chosen.max_sequence_length == 240
    assert chosen.call_arguments(PROMPTS)["max_sequence_length"] == 240
    limits = [family.token_limits()["tokenizer"] - family.max_sequence_length for family in (default, chosen)]
    assert limits[0] == limits[1]
    long = "a" * (240 + limits[1])  # with its template, more than that
    for family in (default, chosen):
        with torch.no_grad():
            conditions = family.encode_prompts([long])[0]
        tokens = int(conditions["mask"].sum()) if "mask" in conditions else len(conditions["prompt_embeds"])
        assert (tokens == 240) == (family is chosen)


@pytest.mark.parametrize(("name", "most"), [("QwenImagePipeline", 1024), ("Lumina2Pipeline", 512)])
def test_more_tokens_than_the_pipeline_takes_are_refused(name: str, most: int) -> None:
    pipeline: Any = tiny_pipeline(name)
    make_family(pipeline, max_sequence_length=most)
    with pytest.raises(
        InputError, match=f"--max_sequence_length must be {most} at most on this model, got {most + 1}"
    ):
        make_family(pipeline, max_sequence_length=most + 1)
    with pytest.raises(ValueError, match=str(most)):
        call(pipeline, max_sequence_length=most + 1)


def test_encoding_leaves_the_prompts_as_they_are(family: Family) -> None:
    prompts = list(PROMPTS)
    family.encode_prompts(prompts)
    assert prompts == PROMPTS


def test_released_text_encoders_are_not_needed(family: Family) -> None:
    pipeline, before = family.pipeline, call(family.pipeline)
    assert release_text_encoders(family, [lambda: call(pipeline)]) == ["text_encoder"]
    np.testing.assert_array_equal(call(pipeline), before)


# Models


def test_sizes(name: str, family: Family) -> None:
    own, multiple = {
        "Flux2KleinPipeline": (256, 4),
        "QwenImagePipeline": (256, 4),
        "ZImagePipeline": (1024, 4),
        "SanaPipeline": (128, 32),
        "Lumina2Pipeline": (32, 16),
    }[name]
    assert (family.own_resolution, family.size_multiple) == (own, multiple)
    with pytest.raises(InputError, match=f"--resolution must be a multiple of {multiple} on this model"):
        family.check_size(SIDE + multiple // 2, "resolution")


def test_transformers_of_more_channels_are_refused(name: str) -> None:
    pipeline: Any = tiny_pipeline(name)
    channels = pipeline.transformer.config.in_channels
    pipeline.transformer.register_to_config(in_channels=2 * channels)
    with pytest.raises(InputError, match=f"the transformer takes {2 * channels} channels and the latents have"):
        make_family(pipeline)


def test_a_transformer_distilled_to_take_the_guidance_scale_is_refused() -> None:
    pipeline: Any = tiny_pipeline("QwenImagePipeline")
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(InputError, match="distilled to take the guidance scale"):
        make_family(pipeline)


@pytest.mark.parametrize(("setting", "value"), [("snr_gamma", 5.0), ("offset_noise", True)])
def test_settings_of_noise_schedules_are_refused(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=f"--{setting}: this model is trained by flow matching"):
        make_family(tiny_pipeline("ZImagePipeline"), **{setting: value})


def test_a_scheduler_of_another_prediction_is_refused() -> None:
    pipeline: Any = tiny_pipeline("SanaPipeline")
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(InputError, match="prediction_type must be flow_prediction, got 'epsilon'"):
        make_family(pipeline)


def test_a_distilled_klein_is_warned_of() -> None:
    pipeline: Any = tiny_pipeline("Flux2KleinPipeline")
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
    fresh.load_lora_weights(result.lora_file.parent)
    with_lora = paint()
    load_coeff_weights(fresh, result.coeff_file.parent)
    both = paint()
    assert np.abs(with_lora - base).max() > 1e-2
    assert np.abs(both - with_lora).max() > 1e-2
    for picture, path in zip(both, result.images[1:], strict=True):
        # rounded to whole levels, of weights that lie otherwise in memory
        np.testing.assert_allclose(picture * 255, np.asarray(Image.open(path), dtype=np.float32), atol=2)


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
