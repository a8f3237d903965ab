"""What a run holds in memory."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny_sd import tiny_pipeline

from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.run import memory
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.memory import release_text_encoders
from coeff_diffusers.training.settings import parse_settings


@pytest.fixture
def family(argv: Callable[..., list[str]]) -> StableDiffusion:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return StableDiffusion(pipeline, parse_settings(argv()))


def image(pipeline: Any, prompts: list[str]) -> np.ndarray:
    return pipeline(prompts, num_inference_steps=1, output_type="np", latents=LATENTS[: len(prompts)]).images


LATENTS = torch.randn(2, 4, 8, 8)


def test_released_text_encoders_are_freed_and_their_answers_kept(family: StableDiffusion) -> None:
    pipeline, prompts = family.pipeline, ["a fox", "a dog"]
    expected = image(pipeline, prompts)
    encoder = weakref.ref(pipeline.text_encoder)
    assert release_text_encoders(family, [lambda: image(pipeline, prompts)]) == ["text_encoder"]
    gc.collect()
    assert encoder() is None
    np.testing.assert_array_equal(image(pipeline, prompts), expected)


def test_a_prompt_that_was_not_encoded_is_an_error_that_shows_it(family: StableDiffusion) -> None:
    release_text_encoders(family, [lambda: image(family.pipeline, ["a fox"])])
    with pytest.raises(RuntimeError, match=r"the text encoders were released .*'a dog'"):
        image(family.pipeline, ["a dog"])


def test_a_call_that_fails_is_not_taken_for_one_that_was_stopped(family: StableDiffusion) -> None:
    with pytest.raises(ValueError, match="`prompt`"):
        release_text_encoders(family, [lambda: family.pipeline()])


def test_training_does_not_hold_the_text_encoder(
    train: Callable[..., TrainingResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = StableDiffusion.errors
    held = []

    def errors(family: StableDiffusion, *args: Any) -> Any:
        held.append(family.pipeline.text_encoder)
        return original(family, *args)

    monkeypatch.setattr(StableDiffusion, "errors", errors)
    train(validation_prompt=["a fox"], num_validation_images=3, sample_batch_size=2, validation_num_inference_steps=1)
    assert held == [None] * 3
    assert "Peak memory of the process: " in capsys.readouterr().out


def test_the_peak_is_had_without_the_module_that_windows_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: SimpleNamespace(peak_wset=2**30))
    try:
        importlib.reload(memory)
        assert memory.peak_memory(torch.device("cpu")) == 2**30
    finally:
        monkeypatch.undo()
        importlib.reload(memory)


def test_class_images_are_generated_before(train: Callable[..., TrainingResult], tmp_path: Path) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    train(**prior, num_class_images=2, max_train_steps=1)
    assert len(list((tmp_path / "class").iterdir())) == 2
