"""Coefficients and LoRA on the text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from running import main
from safetensors.torch import load_file
from tiny_sd import MAX_TOKENS, tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from coeff_diffusers import coeff_parameters, load_coeff_weights
from coeff_diffusers.training.adapters.text_encoders import (
    add_text_encoder_adapters,
    layers_in_use,
    switch_dropout_off,
)
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families import Conditions
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.run import dreambooth
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.step import DenoisingStep
from coeff_diffusers.training.settings import parse_settings

Train = Callable[..., TrainingResult]
Argv = Callable[..., list[str]]
TRAINED = {"train_text_encoder": True, "text_encoder_lr": 0.1}


def image(loaded: Any, prompt: str = "a sks fox") -> np.ndarray:
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return loaded([prompt], num_inference_steps=3, generator=generator, output_type="np").images


def loaded(base: Path, result: TrainingResult) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    if result.coeff_file:
        load_coeff_weights(pipeline, result.coeff_file)
    if result.lora_file:
        pipeline.load_lora_weights(result.lora_file.parent, weight_name=result.lora_file.name)
    return pipeline


@pytest.fixture
def family_seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The family that trains, and the values of its text encoder before."""
    kept: dict[str, Any] = {}
    original = dreambooth.load_family

    def load(*args: Any) -> Any:
        kept["family"] = original(*args)
        kept["encoder"] = kept["family"].pipeline.text_encoder
        kept["before"] = {name: value.clone() for name, value in kept["encoder"].named_parameters()}
        return kept["family"]

    monkeypatch.setattr(dreambooth, "load_family", load)
    return kept


def test_coefficients_of_the_text_encoder_are_in_the_file_and_in_the_image(train: Train, base: Path) -> None:
    result = train(**TRAINED)
    values = load_file(result.coeff_file)
    text = {key: value for key, value in values.items() if key.startswith("text_encoder.")}
    assert {key.partition(".")[0] for key in values} == {"unet", "text_encoder"}
    assert all(value.any() for value in values.values())
    assert result.trained["text_encoder_coefficients"] == sum(value.numel() for value in text.values()) == 4
    assert "4 attention coefficients of the text encoders" in result.model_card.read_text()
    without = StableDiffusionPipeline.from_pretrained(base)
    load_coeff_weights(without, {key: value for key, value in values.items() if key not in text})
    assert np.abs(image(loaded(base, result)) - image(without)).max() > 1e-3  # of a range of 1; float error: 1e-6


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_text_encoder_itself_stays_as_it_was_and_what_trains_is_float32(
    train: Train, family_seen: dict[str, Any], precision: str
) -> None:
    train(**TRAINED, mixed_precision=precision, lora_rank=2)
    after = {name.replace(".base_layer", ""): p for name, p in family_seen["encoder"].named_parameters()}
    for name, value in family_seen["before"].items():
        torch.testing.assert_close(after.pop(name), value, rtol=0, atol=0)
    assert all("lora_" in name for name in after)
    trained = [*after.values(), *coeff_parameters(family_seen["encoder"])]
    assert len(trained) > len(after) > 0
    assert all(value.dtype == torch.float32 and value.any() for value in trained)


@pytest.mark.parametrize("flags", [{}, {"no_coeff": True, "text_encoder_lr": None}])
def test_lora_and_coefficients_make_the_image_of_the_trained_model(
    train: Train, base: Path, family_seen: dict[str, Any], flags: dict[str, Any]
) -> None:
    result = train(**TRAINED | flags, lora_rank=2, lora_alpha=6, text_encoder_lora_lr=0.05)
    keys = load_file(result.lora_file)
    assert {key.partition(".")[0] for key in keys} == {"unet", "text_encoder"}
    trained = family_seen["family"].pipeline
    trained.unet.eval()
    trained.text_encoder.eval()
    np.testing.assert_allclose(image(loaded(base, result)), image(trained), atol=1e-5)  # the same sums
    trained.text_encoder.disable_adapters()
    assert np.abs(image(loaded(base, result)) - image(trained)).max() > 1e-3


def test_prompts_of_both_kinds_are_encoded_in_every_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "class" / "a.png")
    steps: list[Any] = []
    encode, predict = StableDiffusion.encode_prompts, StableDiffusion.predict

    def encode_prompts(family: Any, prompts: list[str]) -> list[Conditions]:
        conditions = encode(family, prompts)
        steps.append((prompts, torch.stack([each["prompt_embeds"] for each in conditions])))
        return conditions

    def seen_predict(family: Any, denoiser: Any, noisy: Any, timesteps: Any, conditions: Any, *rest: Any) -> Any:
        torch.testing.assert_close(conditions["prompt_embeds"], steps[-1][1], rtol=0, atol=0)
        return predict(family, denoiser, noisy, timesteps, conditions, *rest)

    monkeypatch.setattr(StableDiffusion, "encode_prompts", encode_prompts)
    monkeypatch.setattr(StableDiffusion, "predict", seen_predict)
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    train(**TRAINED, **prior, num_class_images=1, train_batch_size=2)
    in_training = [(prompts, values) for prompts, values in steps if len(prompts) == 4]
    assert [prompts for prompts, _ in in_training] == [["a sks fox"] * 2 + ["a fox"] * 2] * 3
    # the class prompt's change with the coefficients, too
    assert not torch.equal(in_training[0][1][2:], in_training[-1][1][2:])


def test_validation_is_by_the_trained_text_encoder_and_leaves_it_alone(
    train: Train, base: Path, tmp_path: Path
) -> None:
    flags = TRAINED | {"coeff_dropout": 0.5}
    plain = train(**flags)
    validated = train(
        **flags,
        output_dir=tmp_path / "validated",
        validation_prompt=["a sks fox"],
        validation_steps=1,
        num_validation_images=1,
        validation_num_inference_steps=3,
    )
    torch.testing.assert_close(load_file(plain.coeff_file), load_file(validated.coeff_file), rtol=0, atol=0)
    with Image.open(validated.images[1]) as written:
        # rounded to 8 bits there
        found = image(loaded(base, plain))[0]
        np.testing.assert_allclose(np.asarray(written) / 255, found, atol=0.51 / 255)


def test_gradient_checkpointing_gives_the_same_coefficients(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_file(train(**TRAINED).coeff_file)
    asked = []
    original = CLIPTextModel.gradient_checkpointing_enable
    monkeypatch.setattr(
        CLIPTextModel, "gradient_checkpointing_enable", lambda *a, **k: asked.append(1) or original(*a, **k)
    )
    checkpointed = train(**TRAINED, gradient_checkpointing=True, output_dir=tmp_path / "checkpointed")
    assert asked == [1]
    torch.testing.assert_close(load_file(checkpointed.coeff_file), plain, rtol=0, atol=0)  # the same sums


# Which layers


class ReadsTheLayerBefore(StableDiffusion):
    """As SDXL does of its first text encoder."""

    def encode_prompts(self, prompts: list[str]) -> list[Conditions]:
        ids = self.pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        embeddings = self.pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        return [{"prompt_embeds": embedding} for embedding in embeddings]


def two_layers(argv: Argv, kind: type[StableDiffusion], **changes: Any) -> StableDiffusion:
    pipeline = tiny_pipeline()
    config = CLIPTextConfig(
        vocab_size=len(pipeline.tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=pipeline.tokenizer.bos_token_id,
        eos_token_id=pipeline.tokenizer.eos_token_id,
    )
    pipeline.register_modules(text_encoder=CLIPTextModel(config).requires_grad_(False))
    return kind(pipeline, parse_settings(argv(train_text_encoder=True, **changes)))


def test_layers_that_the_prompt_does_not_depend_on_get_nothing(argv: Argv) -> None:
    family = two_layers(argv, StableDiffusion)
    both = layers_in_use(family, "text_encoder", "a fox")
    assert len(both) == 2
    family = two_layers(argv, ReadsTheLayerBefore, lora_rank=2)
    assert layers_in_use(family, "text_encoder", "a fox") == both[:1]
    assert not any(p.requires_grad for p in family.pipeline.text_encoder.parameters())
    added = add_text_encoder_adapters(family, family.settings, "a fox")
    assert {what: len(parameters) for what, parameters in added.items()} == {
        "text_encoder_coefficients": 1,
        "text_encoder_lora": 2 * 4,
    }
    trained = [parameter for group in added.values() for parameter in group]
    in_step = {
        id(parameter) for parameter in DenoisingStep(family, family.trained_text_encoders, trained).parameters()
    }
    assert all(id(parameter) in in_step for parameter in trained)  # as DDP needs it
    [conditions] = family.encode_prompts(["a"])
    conditions["prompt_embeds"].square().sum().backward()
    assert all(parameter.grad is not None for group in added.values() for parameter in group)


def test_the_encoders_own_dropout_is_off_in_training() -> None:
    config = T5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=3, dropout_rate=0.5)
    encoder = T5EncoderModel(config)
    ids = torch.tensor([[3, 4, 5]])
    expected = encoder.eval()(ids).last_hidden_state
    assert not torch.equal(encoder.train()(ids).last_hidden_state, expected)
    switch_dropout_off(encoder)
    torch.testing.assert_close(encoder.train()(ids).last_hidden_state, expected, rtol=0, atol=0)


# What is refused


def test_a_text_encoder_that_cannot_be_trained_is_refused_before_class_images_are_made(
    argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    encode = StableDiffusion.encode_prompts
    monkeypatch.setattr(StableDiffusion, "encode_prompts", torch.no_grad()(encode))
    with pytest.raises(
        InputError, match="--train_text_encoder: this pipeline encodes prompts without gradients in te"
    ):
        main(argv(**prior, train_text_encoder=True))
    original = dreambooth.load_family

    def load(*args: Any) -> Any:
        family = original(*args)
        family.pipeline.text_encoder.set_attn_implementation("eager")
        return family

    monkeypatch.setattr(dreambooth, "load_family", load)
    with pytest.raises(
        InputError, match="--train_text_encoder: text_encoder: CLIPTextModel uses the attention 'eager'"
    ):
        main(argv(**prior, train_text_encoder=True))
    assert not list((tmp_path / "class").iterdir())


def test_a_pipeline_without_lora_on_text_encoders_is_refused(argv: Argv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", lambda save_directory, unet_lora_layers: None)
    with pytest.raises(
        InputError, match="StableDiffusionPipeline has no LoRA on text encoders; leave out --lora_rank"
    ):
        main(argv(train_text_encoder=True, lora_rank=2))


def test_its_rates_need_the_flag(argv: Argv) -> None:
    with pytest.raises(InputError, match="--text_encoder_lr needs --train_text_encoder"):
        parse_settings(argv(text_encoder_lr=0.1))
