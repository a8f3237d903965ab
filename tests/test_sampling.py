"""A model's own values of its pipeline's call, in the folder that it is loaded from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from coeff_diffusers.commands import generate
from coeff_diffusers.sampling import sampling_defaults
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.settings.dreambooth import ObjectiveSettings

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"


@pytest.fixture(scope="module")
def embedded() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_embedded_models_have_their_own(embedded: StableDiffusionPipeline) -> None:
    assert sampling_defaults(embedded) == {"guidance_scale": 2.5, "guidance_rescale": 0.7}
    transformer = StableDiffusion3Pipeline.from_pretrained(EMOJI / "model_dit", text_encoder_3=None, tokenizer_3=None)
    assert sampling_defaults(transformer) == {"guidance_scale": 2.5}


def test_generate_and_validation_use_them_under_what_is_given(
    embedded: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rescale = StableDiffusionPipeline.guidance_rescale

    def noted(pipe: StableDiffusionPipeline) -> float:
        seen.append((pipe.guidance_scale, rescale.fget(pipe)))
        return rescale.fget(pipe)

    monkeypatch.setattr(StableDiffusionPipeline, "guidance_rescale", property(noted))
    generate.generate(embedded, ["a pig face"], [0], num_inference_steps=1)
    generate.generate(embedded, ["a pig face"], [0], num_inference_steps=1, guidance_scale=4.0)
    assert set(seen) == {(2.5, 0.7), (4.0, 0.7)}
    family = StableDiffusion(embedded, ObjectiveSettings())
    assert family.call_arguments(["a"]) == {"prompt": ["a"], "guidance_scale": 2.5, "guidance_rescale": 0.7}
    assert family.call_arguments(["a"], 3.0)["guidance_scale"] == 3.0


@pytest.mark.parametrize("text", ["{", "[1]", json.dumps({"guidance": 2.5})])
def test_a_file_that_cannot_be_used_is_named(embedded: StableDiffusionPipeline, tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    pipe = StableDiffusionPipeline(**embedded.components, requires_safety_checker=False)
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"generation_config.json (cannot be read|must hold arguments)"):
        sampling_defaults(pipe)
