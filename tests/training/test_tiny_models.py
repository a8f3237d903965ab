"""The tiny pipelines make images that depend on what a test of training has to see."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hosts import randomise
from tiny_models import FAMILIES, SIDE, call_settings, tiny_pipeline

from coeff_diffusers import add_coeff_adapter, coeff_parameters


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipeline(name: str) -> Any:
    return _silent(tiny_pipeline(name))


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _image(pipeline: Any, prompt: Any = "a fox", seed: int = 0, **changes: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    settings = call_settings(type(pipeline).__name__, **changes)
    return pipeline(prompt=prompt, generator=generator, **settings).images


def test_the_pipeline_is_of_the_family_and_always_the_same(name: str, pipeline: Any) -> None:
    assert type(pipeline).__name__ == name
    image = _image(pipeline)
    assert image.shape == (1, SIDE, SIDE, 3)
    assert np.array_equal(image, _image(pipeline))
    assert np.array_equal(image, _image(_silent(tiny_pipeline(name))))


def test_few_pixels_are_black_or_white(pipeline: Any) -> None:
    image = _image(pipeline)
    assert ((image > 0) & (image < 1)).mean() > 0.9
    assert image.std() > 0.05


def test_a_saved_pipeline_makes_the_same_images(name: str, pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = _silent(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded).__name__ == name
    for prompt in ("a fox", "two grey cats"):  # up to rounding: loaded weights lie otherwise in memory
        np.testing.assert_allclose(_image(loaded, prompt), _image(pipeline, prompt), atol=1e-3)


def test_the_image_depends_on_the_prompt(pipeline: Any) -> None:
    fox, cats = _image(pipeline), _image(pipeline, "two grey cats")
    assert np.abs(fox - cats).max() > 1e-2


def test_prompts_of_several_lengths_go_together(pipeline: Any) -> None:
    alone = _image(pipeline, "a fox")
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    settings = call_settings(type(pipeline).__name__)
    both = pipeline(prompt=["a fox", "two grey cats"], generator=generators, **settings).images
    np.testing.assert_allclose(both[:1], alone, atol=1e-2)


def test_every_coefficient_shows(pipeline: Any) -> None:
    before = _image(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Sana's linear attention has no coefficients
        add_coeff_adapter(pipeline)
    np.testing.assert_allclose(_image(pipeline), before, atol=1e-2)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    randomise(denoiser)
    assert np.abs(_image(pipeline) - before).max() > 1e-2
    filled = [parameter.detach().clone() for parameter in coeff_parameters(pipeline)]
    for i in range(len(filled)):
        with torch.no_grad():
            for j, parameter in enumerate(coeff_parameters(pipeline)):
                parameter.copy_(filled[j] if i == j else torch.zeros_like(parameter))
        assert np.abs(_image(pipeline) - before).max() > 1e-3


def test_qwen_image_drops_its_instruction_and_nothing_of_the_prompt() -> None:
    pipeline: Any = tiny_pipeline("QwenImagePipeline")
    tokens = pipeline.tokenizer(pipeline.prompt_template_encode.format("a fox")).input_ids
    kept = pipeline.tokenizer.decode(tokens[pipeline.prompt_template_encode_start_idx :])
    assert kept == "a fox<|im_end|>\n<|im_start|>assistant\n"
    assert pipeline.encode_prompt("a fox")[0].shape[1] == len(tokens) - 34


@pytest.mark.parametrize("output_type", ["pt", "pil", "latent"])
def test_output_types(pipeline: Any, output_type: str) -> None:
    image = _image(pipeline, output_type=output_type)
    if output_type == "pt":
        assert image.shape == (1, 3, SIDE, SIDE)
    elif output_type == "pil":
        assert image[0].size == (SIDE, SIDE)
    else:
        assert len(image) == 1
        assert image.isfinite().all()
