"""The calls of this package as methods of pipelines, on tiny pipelines of Stable Diffusion, XL and FLUX."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    ModularPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from hosts import randomise
from tiny_sd import tiny_pipeline

from coeff_diffusers import add_coeff_methods, coeff_state_dict
from coeff_diffusers.methods import METHODS

OTHERS = {
    "StableDiffusionPipeline": StableDiffusionImg2ImgPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLImg2ImgPipeline,
    "FluxPipeline": FluxImg2ImgPipeline,
}


@cache
def built(name: str) -> Any:
    pipe = tiny_pipeline() if name == "StableDiffusionPipeline" else tiny_models.tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=OTHERS)
def pipe(request: pytest.FixtureRequest) -> Iterator[Any]:
    """With an adapter `dog`."""
    pipe = built(request.param)
    add_coeff_methods()
    pipe.add_coeff_adapter(adapter_name="dog")
    randomise(pipe, "dog", scale=0.3)
    yield pipe
    if pipe.list_coeff_adapters():
        pipe.unload_coeff_weights()


@pytest.fixture
def without_methods() -> Iterator[None]:
    """diffusers as it is, and afterwards as it was."""
    classes = DiffusionPipeline, ModularPipeline
    before = [{m.__name__: vars(owner)[m.__name__] for m in METHODS if m.__name__ in vars(owner)} for owner in classes]
    for owner, held in zip(classes, before):
        for name in held:
            delattr(owner, name)
    yield
    for owner, held in zip(classes, before):
        for method in METHODS:
            if method.__name__ in vars(owner):
                delattr(owner, method.__name__)
        for name, value in held.items():
            setattr(owner, name, value)


def image(pipe: Any, prompt: str = "a sks dog") -> torch.Tensor:
    name = type(pipe).__name__
    settings = tiny_models.call_settings(name)
    if name == "StableDiffusionPipeline":
        settings |= {"height": 16, "width": 16}
    return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images)


def test_load_choose_and_unload_as_with_a_lora(pipe, tmp_path) -> None:
    tuned = image(pipe)
    pipe.save_coeff_weights(tmp_path, adapter_name="dog")
    pipe.unload_coeff_weights()
    base = image(pipe)
    assert not torch.equal(base, tuned)
    pipe.load_coeff_weights(tmp_path, adapter_name="rex")
    torch.testing.assert_close(image(pipe), tuned, rtol=0, atol=0)  # the same coefficients
    pipe.set_coeff_adapters("rex", 0.0)
    assert pipe.get_active_coeff_adapters() == {"rex": 0.0}
    torch.testing.assert_close(image(pipe), base, rtol=0, atol=0)  # the base model
    pipe.set_coeff_adapters("rex")
    with pipe.coeff_disabled():
        torch.testing.assert_close(image(pipe), base, rtol=0, atol=0)  # the base model
    pipe.delete_coeff_adapters("rex")
    assert pipe.list_coeff_adapters() == []


def test_other_pipelines_of_the_same_model_have_them_too(pipe) -> None:
    other = OTHERS[type(pipe).__name__].from_pipe(pipe)
    assert other.list_coeff_adapters() == ["dog"]
    assert type(other)(**pipe.components).list_coeff_adapters() == ["dog"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_copys_methods_act_on_the_copy(name: str) -> None:
    add_coeff_methods()
    pipe = built.__wrapped__(name)  # one that was not called, for transformers then adds what pickle refuses
    pipe.add_coeff_adapter(adapter_name="dog")
    randomise(pipe, "dog")
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        torch.testing.assert_close(coeff_state_dict(other, "dog"), pipe.coeff_state_dict("dog"), rtol=0, atol=0)
        other.unload_coeff_weights()
    assert copy.copy(pipe).list_coeff_adapters() == ["dog"]
    assert pipe.list_coeff_adapters() == ["dog"]


def test_a_saved_pipeline_is_diffusers_own(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    assert not [key for key in index if "coeff" in key]
    assert DiffusionPipeline.from_pretrained(tmp_path).list_coeff_adapters() == []


def test_a_method_of_diffusers_own_is_not_replaced(without_methods, monkeypatch) -> None:
    monkeypatch.setattr(ModularPipeline, "load_coeff_weights", lambda self: None, raising=False)
    with pytest.raises(ValueError, match=r"methods of these names already: \['ModularPipeline.load_coeff_weights'\]"):
        add_coeff_methods()
    assert not hasattr(DiffusionPipeline, "set_coeff_adapters")


def test_nothing_is_added_before_it_is_asked_for(without_methods) -> None:
    assert not hasattr(built("StableDiffusionPipeline"), "load_coeff_weights")
    add_coeff_methods()
    add_coeff_methods()
    assert ModularPipeline.load_coeff_weights is DiffusionPipeline.load_coeff_weights
