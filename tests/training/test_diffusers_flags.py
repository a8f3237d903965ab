"""Flags of diffusers' scripts that change what a run does, and have no file of tests of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from running import main
from safetensors.torch import load_file
from tiny_sd import tiny_pipeline

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families import save_vae_memory
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.images.dreambooth_dataset import DreamBoothDataset
from coeff_diffusers.training.images.files import folder_images
from coeff_diffusers.training.run import dreambooth
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings import parse_settings

Train = Callable[..., TrainingResult]
Argv = Callable[..., list[str]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The family that trains."""
    kept: dict[str, Any] = {}
    original = dreambooth.load_family

    def load(*args: Any) -> Any:
        kept["family"] = original(*args)
        kept["text_encoder"] = kept["family"].pipeline.text_encoder  # released later
        return kept["family"]

    monkeypatch.setattr(dreambooth, "load_family", load)
    return kept


def image(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(["a sks fox"], num_inference_steps=3, generator=generator, output_type="np").images


# LoRA


def test_rank_is_another_name_of_lora_rank(argv: Argv) -> None:
    assert parse_settings(argv(rank=3)) == parse_settings(argv(lora_rank=3))


@pytest.mark.parametrize("layers", ["attn2.to_q,down_blocks.*.to_out.0", ["attn2.to_q", "down_blocks.*.to_out.0"]])
def test_lora_layers_are_names_or_patterns(train: Train, layers: Any) -> None:
    names = {key.rpartition(".lora")[0] for key in load_file(train(lora_rank=2, lora_layers=layers).lora_file)}
    queries = {name for name in names if name.endswith("attn2.to_q")}
    outs = {name for name in names if name.startswith("unet.down_blocks") and name.endswith("to_out.0")}
    assert (len(queries), len(outs), len(names)) == (7, 4, 11)


def test_lora_layers_that_are_not_there_are_named_before_class_images_are_made(argv: Argv, tmp_path: Path) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    with pytest.raises(InputError, match=r"--lora_layers: \['to_x', 'up'\] match no linear layer or convolution"):
        main(argv(**prior, lora_rank=2, lora_layers="to_x,to_q,up"))
    assert not list((tmp_path / "class").iterdir())


def test_a_dora_makes_the_image_of_the_trained_model(train: Train, seen: dict[str, Any], base: Path) -> None:
    result = train(lora_rank=2, use_dora=True, no_coeff=True, lora_learning_rate=0.05)
    values = load_file(result.lora_file)
    assert any("magnitude" in key for key in values)
    trained = seen["family"].pipeline
    trained.register_modules(text_encoder=seen["text_encoder"])
    del trained.encode_prompt  # the released one's stand-in
    trained.unet.eval()
    loaded = StableDiffusionPipeline.from_pretrained(base)
    before = image(loaded)
    loaded.load_lora_weights(result.lora_file.parent, weight_name=result.lora_file.name)
    np.testing.assert_allclose(image(loaded), image(trained), atol=1e-5)  # the same sums
    assert np.abs(image(loaded) - before).max() > 1e-2


def test_lora_dropout_takes_part_in_training_alone(
    train: Train, tmp_path: Path, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(lora_rank=2, output_dir=tmp_path / "plain")
    flags = {"lora_rank": 2, "lora_dropout": 0.5}
    dropped = train(**flags)
    assert any(
        not torch.equal(value, load_file(plain.lora_file)[key]) for key, value in load_file(dropped.lora_file).items()
    )
    validated = train(
        **flags,
        output_dir=tmp_path / "validated",
        validation_prompt=["a fox"],
        num_validation_images=1,
        validation_steps=1,
        validation_num_inference_steps=1,
    )
    torch.testing.assert_close(load_file(validated.lora_file), load_file(dropped.lora_file), rtol=0, atol=0)


@pytest.mark.parametrize("flag", [{"lora_dropout": 0.1}, {"lora_layers": "to_q"}, {"use_dora": True}])
def test_flags_of_the_lora_need_one(argv: Argv, flag: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(flag))} needs a --lora_rank of 1 or more"):
        parse_settings(argv(**flag))


# Prompts


def test_caption_dropout_empties_prompts_and_changes_nothing_else(images: Path) -> None:
    instance_images = folder_images(images, "instance_data_dir", "a fox")
    shared: dict[str, Any] = {"resolution": 16, "seed": 0}
    plain = DreamBoothDataset(300, instance_images, instance_images, **shared)
    dropped = DreamBoothDataset(300, instance_images, instance_images, **shared, caption_dropout=0.3)
    pairs = [(one, other) for n in range(300) for one, other in zip(plain[n], dropped[n])]
    empty = [other.kind for _, other in pairs if other.prompt == ""]
    assert all(other.prompt in ("", one.prompt) and other.seed == one.seed for one, other in pairs)
    assert all(torch.equal(one.pixels, other.pixels) for one, other in pairs[:20])
    assert 60 < empty.count("instance") < 120  # 90 +- 8
    assert 60 < empty.count("class") < 120
    assert [a.prompt for a in (dropped[n][0] for n in range(300))] != [
        a.prompt for a in (dropped[n][1] for n in range(300))
    ]


def test_the_empty_prompt_is_trained_with(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = StableDiffusion.conditions
    monkeypatch.setattr(
        StableDiffusion, "conditions", lambda family, prompts: asked.extend(prompts) or original(family, prompts)
    )
    train(caption_dropout=0.5, max_train_steps=4)
    assert set(asked) == {"a sks fox", ""}


# Validation


def grids(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.rglob("grid.png")}


def test_images_after_training_may_have_prompts_of_their_own(train: Train, tmp_path: Path) -> None:
    flags = {"validation_steps": 1, "num_validation_images": 1, "validation_num_inference_steps": 1}
    result = train(**flags, validation_prompt=["a fox"], final_validation_prompt=["a hat", "a sky"], max_train_steps=2)
    assert grids(tmp_path / "out") == {"step-000001", "step-000002"}
    assert [path.name for path in result.images[1:]] == ["prompt0-image0.png", "prompt1-image0.png"]
    card = result.model_card.read_text()
    assert "1. a hat\n2. a sky" in card
    assert "a fox" not in card
    assert result.settings.validation_prompt == ("a fox",)


def test_images_after_training_may_be_left_out(train: Train, tmp_path: Path) -> None:
    flags = {"validation_steps": 1, "num_validation_images": 1, "validation_num_inference_steps": 1}
    result = train(**flags, validation_prompt=["a fox"], skip_final_inference=True, max_train_steps=2)
    assert grids(tmp_path / "out") == {"step-000001"}
    assert result.images == []


def test_validation_epochs_are_passes_over_the_images(train: Train, argv: Argv) -> None:
    flags = {"validation_prompt": "a fox", "num_validation_images": 1, "validation_num_inference_steps": 1}
    # 3 images x 2 / a batch of 2
    assert train(**flags, validation_epochs=2, max_train_steps=1).settings.validation_steps == 3
    with pytest.raises(InputError, match="--validation_steps and --validation_epochs exclude each other"):
        parse_settings(argv(validation_epochs=2, validation_steps=1))
    with pytest.raises(InputError, match="--final_validation_prompt and --skip_final_inference exclude each other"):
        parse_settings(argv(final_validation_prompt="a", skip_final_inference=True))


# VAE


def test_another_vae_takes_the_place_of_the_models_own(
    train: Train, seen: dict[str, Any], tmp_path: Path, argv: Argv
) -> None:
    vae = tiny_pipeline().vae
    for parameter in vae.parameters():
        parameter.data.mul_(1.5)
    vae.save_pretrained(tmp_path / "vae")
    plain = train().losses
    other = train(pretrained_vae_model_name_or_path=tmp_path / "vae").losses
    torch.testing.assert_close(seen["family"].pipeline.vae.state_dict(), vae.state_dict(), rtol=0, atol=0)
    assert plain != other
    with pytest.raises(InputError, match="--pretrained_vae_model_name_or_path: there is no VAE at"):
        main(argv(pretrained_vae_model_name_or_path=tmp_path / "none"))


def test_the_vae_computes_in_tiles_and_slices_where_it_can(train: Train, seen: dict[str, Any]) -> None:
    train(max_train_steps=1)
    assert not seen["family"].pipeline.vae.use_tiling
    train(enable_vae_tiling=True, enable_vae_slicing=True, max_train_steps=1)
    assert seen["family"].pipeline.vae.use_tiling
    assert seen["family"].pipeline.vae.use_slicing
    with pytest.raises(InputError, match="--enable_vae_tiling: Identity cannot do that"):
        save_vae_memory(torch.nn.Identity(), "tiling")


def test_latents_are_drawn_or_the_mean(argv: Argv) -> None:
    moments = torch.stack([torch.full((1, 4, 8, 8), 2.0), torch.ones(1, 4, 8, 8)], dim=1)
    families = [StableDiffusion(tiny_pipeline(), parse_settings(argv(vae_encode_mode=m))) for m in ("sample", "mode")]
    drawn, mean = (family.sample_latents(moments, [torch.Generator().manual_seed(0)]) for family in families)
    assert drawn.unique().numel() > 1
    torch.testing.assert_close(mean, families[1].normalise(moments[:, 0]), rtol=0, atol=0)
