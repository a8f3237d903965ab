"""The script from end to end, on a tiny Stable Diffusion."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from running import main
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from coeff_diffusers import CoeffConfig, add_coeff_adapter, coeff_parameters, load_coeff_weights
from coeff_diffusers.adapters import layer_coefficients
from coeff_diffusers.checkpoint import coeff_state_dict
from coeff_diffusers.training.adapters import check_trainable
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.images import class_images
from coeff_diffusers.training.run import dreambooth
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings import parse_settings

Train = Callable[..., TrainingResult]
SCRIPT = Path(__file__).parents[2] / "training" / "train_dreambooth.py"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def coefficients(result: TrainingResult) -> dict[str, Tensor]:
    assert result.coeff_file is not None
    return load_file(result.coeff_file)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def pipeline(base: Path) -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(base)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def image(loaded: StableDiffusionPipeline, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return loaded(["a sks fox"], num_inference_steps=3, generator=generator, output_type="np").images


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The model as it stands at the end of training, and what stood in it before, by name."""
    kept: dict[str, Any] = {}
    original_steps, original_load = dreambooth.DreamBoothRun.steps, dreambooth.load_family

    def load(*args: Any) -> Any:
        kept["family"] = original_load(*args)
        kept["family"].load_denoiser()
        kept["parts"] = dict(kept["family"].pipeline.components)  # text encoders are released later
        kept["before"] = _values(kept["parts"])
        return kept["family"]

    def steps(run: Any) -> Any:
        yield from original_steps(run)
        coefficients = layer_coefficients(kept["family"].pipeline)
        kept["after"] = _values(kept["parts"]) | {
            f"{n}.coeff.default": layer.coeff["default"].detach().clone() for n, layer in enumerate(coefficients)
        }

    monkeypatch.setattr(dreambooth.DreamBoothRun, "steps", steps)
    monkeypatch.setattr(dreambooth, "load_family", load)
    return kept


def trained_pipeline(seen: dict[str, Any]) -> StableDiffusionPipeline:
    """The pipeline as it was trained, with its text encoder."""
    loaded = seen["family"].pipeline
    loaded.register_modules(text_encoder=seen["parts"]["text_encoder"])
    del loaded.encode_prompt  # the released one's stand-in
    loaded.unet.eval()
    return loaded


def _values(components: dict[str, Any]) -> dict[str, Tensor]:
    # peft moves a layer that it adapts one level down, to <layer>.base_layer
    parts = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}".replace(".base_layer", ""): value.detach().clone()
        for name, part in parts.items()
        for key, value in [*part.named_parameters(), *part.named_buffers()]
    }


# What a run writes


def test_a_run_writes_exactly_these_files(train: Train, tmp_path: Path) -> None:
    train()
    names = {"pytorch_coeff_weights.safetensors", "README.md", "config.yaml", ".run.lock"}
    assert files_in(tmp_path / "out") == names


def test_validation_lora_and_log_add_exactly_these_files(train: Train, tmp_path: Path) -> None:
    result = train(
        validation_prompt=["a fox", "fox"],
        num_validation_images=2,
        validation_steps=2,
        validation_num_inference_steps=2,
        lora_rank=2,
        report_to="tensorboard",
    )
    images = {"grid.png"} | {f"prompt{r}-image{c}.png" for r in range(2) for c in range(2)}
    written = files_in(tmp_path / "out")
    logs = {name for name in written if name.startswith("logs/")}
    assert written - logs == {
        "pytorch_coeff_weights.safetensors",
        "pytorch_lora_weights.safetensors",
        "README.md",
        "config.yaml",
        ".run.lock",
    } | {f"validation/step-00000{step}/{name}" for step in (2, 3) for name in images}
    assert {name.partition("/events")[0] for name in logs if "events" in name} > {"logs/dreambooth"}
    assert [path.name for path in result.images] == sorted(images)
    with Image.open(result.images[0]) as grid, Image.open(result.images[1]) as single:
        assert (grid.size, single.size) == ((32, 32), (16, 16))


def test_the_users_images_are_left_alone(train: Train, images: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images.iterdir()}
    train()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images.iterdir()} == before


def test_runs_of_one_process_share_nothing_that_accelerate_keeps(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    def run(name: str, **precision: str) -> TrainingResult:
        return main(argv(max_train_steps=1, output_dir=tmp_path / name, **precision))

    first = run("first")
    assert run("second", mixed_precision="bf16").settings.mixed_precision == "bf16"
    third = run("third")  # which does not say a precision
    assert third.settings.mixed_precision == "no"
    assert_equal(coefficients(first), coefficients(third))


def test_the_saved_settings_given_as_config_are_the_same_run(train: Train, tmp_path: Path) -> None:
    first = train(max_train_steps=None, num_train_epochs=2, seed=None, scale_lr=True)
    saved = parse_settings(["--config", str(first.settings_file)])
    assert saved == first.settings
    assert (saved.max_train_steps, saved.resolution, saved.learning_rate) == (3, 16, 0.1)
    second = main(["--config", str(first.settings_file), "--output_dir", str(tmp_path / "again")])
    assert_equal(coefficients(first), coefficients(second))


def test_the_coefficient_file_says_how_it_was_trained(train: Train) -> None:
    result = train(coeff_dropout=0.1, seed=5)
    with safe_open(result.coeff_file, "pt") as file:
        header = file.metadata()
    named = ("instance_prompt", "steps", "batch_size", "learning_rate", "coeff_dropout", "seed", "torch_version")
    assert [header[name] for name in named] == ["a sks fox", "3", "2", "0.05", "0.1", "5", torch.__version__]


def test_the_card_shows_images_and_its_lines_load_the_weights(
    train: Train, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(lora_rank=2, validation_prompt=["a fox"], num_validation_images=1, validation_num_inference_steps=2)
    card = result.model_card.read_text()
    assert (
        f"![Images of the trained model, a row per prompt]({result.images[0].relative_to(result.model_card.parent)})"
        in card
    )
    assert "base_model" not in card.split("---\n")[1]  # which must be a name on the Hub
    assert "library_name" not in card
    assert "the frozen base model `tiny-sd`" in card
    assert "instance_prompt: a sks fox\n" in card
    assert "- text: a fox\n  output:\n    url: validation/step-000003/prompt0-image0.png\n" in card
    assert "| steps | 3 |" in card
    assert str(base.parent) not in card
    code = (
        card.partition("```python\n")[2]
        .partition("```")[0]
        .replace("path/to/this/folder", str(result.model_card.parent))
    )
    monkeypatch.chdir(base.parent)
    names: dict[str, Any] = {}
    exec(code.replace('("a sks fox")', '("a sks fox", num_inference_steps=1)'), names)
    assert names["image"].size == (16, 16)
    assert names["pipe"].get_active_adapters() == ["default_0"]
    assert_equal(coeff_state_dict(names["pipe"]), load_file(result.coeff_file))


def test_counts_are_printed(train: Train, capsys: pytest.CaptureFixture[str], seen: dict[str, Any]) -> None:
    train(lora_rank=2)
    frozen = sum(value.numel() for key, value in seen["before"].items() if "position_ids" not in key)
    printed = capsys.readouterr().out
    coeffs, lora = coefficients_and_lora(seen)
    count, share = coeffs + lora, 100 * (coeffs + lora) / (coeffs + lora + frozen)
    assert (
        f"trainable params: {count:,} || all params: {count + frozen:,} || trainable%: {share:.4f} "
        f"(coefficients {coeffs:,}, lora {lora:,})\n" in printed
    )
    assert "pytorch_lora_weights.safetensors (" in printed


def coefficients_and_lora(seen: dict[str, Any]) -> tuple[int, int]:
    added = {key: value.numel() for key, value in seen["after"].items() if key not in seen["before"]}
    lora = sum(count for key, count in added.items() if "lora" in key)
    return sum(added.values()) - lora, lora


# What is trained


@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 2}, {"lora_rank": 2, "no_coeff": True}, {"lora_rank": 2, "mixed_precision": "bf16"}]
)
def test_what_is_asked_for_moves_and_nothing_else(train: Train, seen: dict[str, Any], flags: dict[str, Any]) -> None:
    result = train(**flags)
    added = {key: value for key, value in seen["after"].items() if key not in seen["before"]}
    assert_equal({key: seen["after"][key] for key in seen["before"]}, seen["before"])
    is_coeff = {key: key.endswith(".coeff.default") for key in added}
    assert all(is_coeff[key] or "lora_" in key for key in added)
    assert any(is_coeff.values()) == (result.coeff_file is not None) == ("no_coeff" not in flags)
    assert (not all(is_coeff.values())) == (result.lora_file is not None) == ("lora_rank" in flags)
    # all start at zero, but for LoRA's first factor
    assert all(value.any() and value.dtype == torch.float32 for value in added.values())


def test_the_file_changes_the_image_of_a_fresh_pipeline(train: Train, base: Path) -> None:
    loaded = pipeline(base)
    before = image(loaded)
    load_coeff_weights(loaded, train().coeff_file)
    assert np.abs(image(loaded) - before).max() > 0.01  # of a range of 1; float error is 1e-6


def test_both_files_make_the_image_of_the_trained_model(train: Train, seen: dict[str, Any], base: Path) -> None:
    result = train(lora_rank=2, lora_alpha=6, lora_learning_rate=0.01)
    loaded = pipeline(base)
    load_coeff_weights(loaded, result.coeff_file)
    loaded.load_lora_weights(result.lora_file.parent, weight_name=result.lora_file.name)
    # the same sums; alpha / rank = 3 is lost where rank and alpha are not in the file
    np.testing.assert_allclose(image(loaded), image(trained_pipeline(seen)), atol=1e-5)
    without = pipeline(base)
    load_coeff_weights(without, result.coeff_file)
    assert np.abs(image(without) - image(loaded)).max() > 0.01


def test_kinds_and_patterns_choose_the_layers(train: Train) -> None:
    chosen = coefficients(
        train(coeff_kinds=["cross"], coeff_include=["down_blocks.*", "mid_block.*"], coeff_exclude="mid_block.*")
    )
    assert chosen
    assert all(key.startswith("unet.down_blocks") and key.endswith("attn2.coeff") for key in chosen)


def test_a_parameter_that_trains_by_mistake_is_named(base: Path, argv: Callable[..., list[str]]) -> None:
    family = StableDiffusion(pipeline(base), parse_settings(argv()))
    for part in (family.pipeline.unet, family.pipeline.vae, family.pipeline.text_encoder):
        part.requires_grad_(False)
    add_coeff_adapter(family.pipeline, CoeffConfig())
    parameters = {"coefficients": coeff_parameters(family.pipeline)}
    check_trainable(family, parameters)
    family.pipeline.unet.conv_in.bias.requires_grad_(True)
    parameters["coefficients"][0].requires_grad_(False)
    parameters["coefficients"][1].data = parameters["coefficients"][1].data.half()
    with pytest.raises(RuntimeError) as error:
        check_trainable(family, parameters)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3
    assert "  unet.conv_in.bias is trainable" in lines
    assert sum("is frozen" in line for line in lines) == sum("float16" in line for line in lines) == 1


# Same run, same coefficients


def test_the_same_seed_gives_the_same_result_and_seeds_0_and_1_do_not(train: Train) -> None:
    def files(seed: int) -> list[dict[str, Tensor]]:
        result = train(coeff_dropout=0.3, random_flip=True, lora_rank=1, seed=seed)
        return [load_file(result.coeff_file), load_file(result.lora_file)]

    first, again, other = files(0), files(0), files(1)
    for values, same_values, other_values in zip(first, again, other):
        assert_equal(values, same_values)
        assert all(not torch.equal(values[key], other_values[key]) for key in values)


def test_dropout_takes_part_in_training(train: Train) -> None:
    plain, dropped = (coefficients(train(coeff_dropout=rate)) for rate in (0.0, 0.3))
    assert all(not torch.equal(plain[key], dropped[key]) for key in plain)


def test_a_second_run_into_the_same_folder_takes_its_place(train: Train, tmp_path: Path) -> None:
    train(seed=1)
    assert_equal(coefficients(train(seed=0)), coefficients(train(seed=0, output_dir=tmp_path / "other")))
    assert "\nseed: 0\n" in (tmp_path / "out" / "config.yaml").read_text()


def test_workers_change_nothing(train: Train) -> None:
    assert_equal(
        coefficients(train(random_flip=True)), coefficients(train(random_flip=True, dataloader_num_workers=2))
    )


def test_validation_leaves_the_result_bit_for_bit_the_same(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StableDiffusionPipeline.__call__

    def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)  # a scheduler may draw without the generator that it is given
        return original(pipeline, *args, **kwargs)

    call.__signature__ = inspect.signature(original)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    flags = {"coeff_dropout": 0.3, "mixed_precision": "bf16", "max_train_steps": 4}
    plain = coefficients(train(**flags))
    validated = train(
        **flags,
        validation_prompt=["a", "b"],
        num_validation_images=3,
        sample_batch_size=2,
        validation_steps=1,
        validation_num_inference_steps=2,
    )
    assert_equal(plain, coefficients(validated))


def test_validation_images_are_those_of_the_trained_model(train: Train, seen: dict[str, Any]) -> None:
    result = train(
        validation_prompt=["a sks fox"],
        num_validation_images=2,
        validation_num_inference_steps=3,
        seed=3,
        coeff_dropout=0.5,
    )
    trained = trained_pipeline(seen)
    for i, path in enumerate(result.images[1:]):
        generated = image(trained, seed=3 + i)[0]
        with Image.open(path) as written:
            # rounded to 8 bits there
            np.testing.assert_allclose(np.asarray(written) / 255, generated, atol=0.51 / 255)


def test_two_batches_of_one_accumulated_equal_one_of_two(train: Train) -> None:
    flags = {"adam_epsilon": 1e-3, "random_flip": True, "max_train_steps": 4}
    one = train(**flags, train_batch_size=2)
    two = train(**flags, train_batch_size=1, gradient_accumulation_steps=2)
    # the sum over the batch is taken in another order; Adam divides by the gradient's size, hence the epsilon
    torch.testing.assert_close(coefficients(one), coefficients(two), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(one.losses, two.losses, rtol=1e-4, atol=0)
    assert max(value.abs().max() for value in coefficients(one).values()) > 0.01


def test_gradient_checkpointing_gives_the_same_coefficients(train: Train) -> None:
    flags = {"coeff_dropout": 0.3, "lora_rank": 2}
    plain, checkpointed = (train(**flags, gradient_checkpointing=on) for on in (False, True))
    assert_equal(coefficients(plain), coefficients(checkpointed))  # the same sums in the same order
    assert_equal(load_file(plain.lora_file), load_file(checkpointed.lora_file))


def test_gradient_checkpointing_computes_activations_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    train(max_train_steps=1)
    assert not calls
    train(max_train_steps=1, gradient_checkpointing=True)
    assert calls


def test_training_lowers_the_loss_on_the_images_it_sees(train: Train) -> None:
    losses = train(max_train_steps=60, train_batch_size=4, learning_rate=0.03).losses
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


# Learning rates


def logged(result: TrainingResult, name: str) -> list[float]:
    events = EventAccumulator(str(result.settings_file.parent / "logs" / "dreambooth")).Reload()
    return [event.value for event in events.Scalars(name)]


def test_the_schedule_counts_optimizer_steps_under_accumulation(train: Train) -> None:
    result = train(
        max_train_steps=6,
        gradient_accumulation_steps=3,
        lr_scheduler="linear",
        lr_warmup_steps=2,
        learning_rate=0.04,
        lora_rank=1,
        lora_learning_rate=0.004,
        report_to="tensorboard",
    )
    expected = [0.0, 0.02, 0.04, 0.03, 0.02, 0.01]
    np.testing.assert_allclose(logged(result, "learning_rate/coefficients"), expected, rtol=1e-6)  # float32 in the log
    np.testing.assert_allclose(logged(result, "learning_rate/lora"), np.array(expected) / 10, rtol=1e-6)
    np.testing.assert_allclose(logged(result, "loss"), result.losses, rtol=1e-6)
    assert len(result.losses) == 6


def test_scale_lr_multiplies_both_rates_by_the_images_of_a_step(train: Train) -> None:
    result = train(scale_lr=True, gradient_accumulation_steps=3, train_batch_size=2, lora_rank=1, max_train_steps=1)
    assert result.settings.learning_rate == pytest.approx(0.3)
    assert result.settings.lora_learning_rate == pytest.approx(6e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"scale_lr": True, "gradient_accumulation_steps": 3},
        {"scale_lr": True, "lora_rank": 1, "no_coeff": True},
        {"scale_lr": True, "train_text_encoder": True},
        {"scale_lr": True, "train_text_encoder": True, "lora_rank": 1, "no_coeff": True},
        {"learning_rate": 0.5, "optimizer": "prodigy", "lora_rank": 1, "no_coeff": True},
        {"aspect_ratio_buckets": "16,24;24,16"},
        {"final_validation_prompt": "a fox", "num_validation_images": 1, "validation_num_inference_steps": 1},
        {"validation_prompt": "a fox", "validation_epochs": 3, "skip_final_inference": True},
    ],
)
def test_the_file_that_a_run_writes_is_of_the_same_run(train: Train, flags: dict[str, Any]) -> None:
    result = train(max_train_steps=1, **flags)
    assert parse_settings(["--config", str(result.settings_file)]) == result.settings


def test_epochs_are_passes_over_the_images(train: Train) -> None:
    assert len(train(max_train_steps=None, num_train_epochs=4).losses) == 6  # 3 images x 4 / a batch of 2


# Prior preservation


def test_missing_class_images_are_generated_and_kept(train: Train, tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "mine.png").write_bytes((images / "0.png").read_bytes())
    flags = {
        "with_prior_preservation": True,
        "class_data_dir": folder,
        "class_prompt": "a fox",
        "num_class_images": 4,
        "sample_batch_size": 2,
        "max_train_steps": 2,
    }
    first = train(**flags)
    assert files_in(folder) == {"mine.png", "class-00000.png", "class-00001.png", "class-00002.png"}
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = train(**flags)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert_equal(coefficients(first), coefficients(second))
    assert not torch.equal(*(torch.tensor(run.losses) for run in (first, train(**flags, prior_loss_weight=0.5))))


def test_each_image_of_a_batch_has_the_prompt_of_its_kind(
    train: Train, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, color in (("instance", "red"), ("class", "blue")):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (16, 16), color).save(tmp_path / kind / "a.png")
    batches = seen_batches(monkeypatch)
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    train(instance_data_dir=tmp_path / "instance", num_class_images=1, train_batch_size=2, max_train_steps=2, **prior)
    subject, fox = embedded(base, ["a sks fox", "a fox"])
    for pixels, embeddings in batches:
        assert pixels[:, 0].mean((1, 2)).tolist() == [1.0, 1.0, -1.0, -1.0]  # red first, then blue
        assert not torch.equal(subject, fox)
        torch.testing.assert_close(embeddings, torch.stack([subject, subject, fox, fox]), rtol=0, atol=0)
    assert len(batches) == 2


def embedded(base: Path, prompts: list[str]) -> Tensor:
    return pipeline(base).encode_prompt(prompts, "cpu", 1, False)[0].detach()


def seen_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Pixels and the embeddings that the denoiser gets with them, of each batch."""
    batches: list[Any] = []
    pending: list[Tensor] = []  # images are encoded one at a time
    encode, predict = StableDiffusion.encode_images, StableDiffusion.predict

    def encode_images(family: Any, pixels: Tensor) -> Tensor:
        pending.append(pixels)
        return encode(family, pixels)

    def seen_predict(family: Any, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Any, *rest: Any) -> Any:
        batches.append((torch.cat(pending), conditions["prompt_embeds"]))
        pending.clear()
        return predict(family, denoiser, noisy, timesteps, conditions, *rest)

    monkeypatch.setattr(StableDiffusion, "encode_images", encode_images)
    monkeypatch.setattr(StableDiffusion, "predict", seen_predict)
    return batches


def test_captions_take_the_place_of_the_instance_prompt(
    train: Train, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
    entries = [{"file_name": f"{color}.png", "text": f"a fox on {color}"} for color in ("red", "blue")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    batches = seen_batches(monkeypatch)
    train(instance_data_dir=folder, caption_column="text", max_train_steps=2)
    assert len(batches) == 2
    red, blue = embedded(base, ["a fox on red", "a fox on blue"])
    for pixels, embeddings in batches:
        assert not torch.equal(red, blue)
        expected = torch.stack([red if image[0].mean() > 0 else blue for image in pixels])
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=0)


def test_what_cannot_be_put_on_is_refused_before_class_images_are_made(
    argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    with pytest.raises(InputError, match=r"--coeff_include.*\['attn3'\] match none of the"):
        main(argv(coeff_include="attn3", **prior))
    monkeypatch.setattr("coeff_diffusers.training.adapters.is_peft_available", lambda: False)
    with pytest.raises(InputError, match="--lora_rank needs peft: pip install"):
        main(argv(lora_rank=2, **prior))
    assert not list((tmp_path / "class").glob("*"))


def test_a_class_folder_that_is_full_need_not_be_writable(
    train: Train, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = class_images.make_writable
    monkeypatch.setattr(
        "coeff_diffusers.training.images.class_images.make_writable",
        lambda folder, name: asked.append(name) or original(folder, name),
    )
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "mine.png").write_bytes((images / "0.png").read_bytes())
    flags = {"with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a fox", "max_train_steps": 1}
    train(**flags, num_class_images=1)
    assert not asked
    train(**flags, num_class_images=2)
    assert asked == ["class_data_dir"]


# Failures in training


def test_a_loss_that_is_not_finite_stops_with_the_step_and_writes_no_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StableDiffusion.errors
    calls = []

    def errors(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(StableDiffusion, "errors", errors)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2 of 3"):
        train(gradient_accumulation_steps=2)
    assert files_in(tmp_path / "out") == {"config.yaml", ".run.lock"}


def test_weights_are_written_before_the_last_validation(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(dreambooth, "run_calls", fail)
    with pytest.raises(MemoryError):
        train(validation_prompt=["a"])
    written = {name for name in files_in(tmp_path / "out") if not name.startswith("checkpoint-3/")}
    assert written == {"pytorch_coeff_weights.safetensors", "config.yaml", ".run.lock"}


# From the command line


@pytest.mark.slow
def test_accelerate_launch_runs_it_from_another_folder(
    argv: Callable[..., list[str]], train: Train, tmp_path: Path
) -> None:
    expected = coefficients(train())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT)]
    done = subprocess.run(
        [*command, *argv(output_dir="relative")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "trainable params: " in done.stdout
    # its own process may use another number of threads, and so sum in another order
    torch.testing.assert_close(
        load_file(tmp_path / "relative" / "pytorch_coeff_weights.safetensors"), expected, rtol=1e-2, atol=1e-4
    )


@pytest.mark.slow
def test_the_command_line_shows_an_input_error_without_a_traceback(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv(instance_data_dir=tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: --instance_data_dir: {tmp_path / 'nowhere'} does not exist"
    assert "Traceback" not in done.stderr
