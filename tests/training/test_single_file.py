"""A base model in a single file trains and generates as the same model in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from ldm_file import save_single_file
from running import main
from safetensors.torch import load_file, save_file
from tiny_sd import tiny_pipeline

from coeff_diffusers import read_coeff_metadata
from coeff_diffusers.commands import generate
from coeff_diffusers.commands.requests import PromptsError, value_of
from coeff_diffusers.quantization import Quantization
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families.single_file import load_single_file, single_file_config
from coeff_diffusers.training.run.dreambooth import TrainingResult


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(tiny_pipeline(), tmp_path_factory.mktemp("file") / "fox.safetensors")


def test_a_run_on_a_single_file_is_the_run_on_its_folder(
    train: Callable[..., TrainingResult], base: Path, file: Path, tmp_path: Path
) -> None:
    of_folder = train(max_train_steps=2)
    single = {"pretrained_model_name_or_path": str(file), "single_file_config": str(base)}
    of_file = train(max_train_steps=2, output_dir=tmp_path / "single", **single)
    assert of_file.losses == of_folder.losses
    torch.testing.assert_close(load_file(of_file.coeff_file), load_file(of_folder.coeff_file), rtol=0, atol=0)
    assert read_coeff_metadata(of_file.coeff_file)["coeff_diffusers"]["base"]["unet"]["name"] == "fox.safetensors"
    assert 'StableDiffusionPipeline.from_single_file("fox.safetensors")' in of_file.model_card.read_text()
    args = argparse.Namespace(
        **single,
        coeff_scale=1.0,
        lora_weights=None,
        dtype="float32",
        quantize=None,
        gguf_file=None,
        group_offload=False,
    )
    pipe = generate.load_pipeline(args, {"default": of_file.coeff_file}, "cpu")
    torch.testing.assert_close(pipe.unet.conv_in.weight, tiny_pipeline().unet.conv_in.weight, rtol=0, atol=0)


def test_without_a_config_it_is_diffusers_choice_by_the_files_keys(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_config(name: str, **hub: Any) -> dict[str, Any]:
        asked.append(name)
        raise OSError("the Hub cannot be reached")

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    with pytest.raises(ValueError, match="OSError: the Hub cannot be reached") as error:
        single_file_config(str(file), None)
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert str(error.value).splitlines()[-2:] == [
        f"  pipe = diffusers.StableDiffusionPipeline.from_single_file('{file}')",
        f"  pipe.save_pretrained('{file.with_suffix('')}')",
    ]


@pytest.mark.parametrize(
    "name", ["lora.safetensors", "part.safetensors", "text.safetensors", "torn.safetensors", "fox.ckpt"]
)
def test_a_file_that_is_no_base_model_is_named_with_ways_out(
    argv: Callable[..., list[str]], base: Path, file: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"no weights")
    if name == "lora.safetensors":
        save_file({"unet.down_blocks.0.lora_A.weight": torch.zeros(2, 2)}, path)
    if lacking := {"part.safetensors": "output_blocks.0.1", "text.safetensors": "final_layer_norm"}.get(name):
        save_file({key: value for key, value in load_file(file).items() if lacking not in key}, path)
    single = {"pretrained_model_name_or_path": path, "single_file_config": base}
    with pytest.raises(
        InputError, match=f"--pretrained_model_name_or_path: .*{name} cannot be loaded as a base model"
    ):
        main(argv(**single))
    with pytest.raises(PromptsError, match="convert it once"), value_of("--pretrained_model_name_or_path"):
        load_single_file(str(path), str(base), dtype=torch.float32, quantization=Quantization(), device="cpu")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"single_file_config": "x"}, "--single_file_config is for a base model in a single file, and .* is none"),
        ({"pretrained_model_name_or_path": "file", "variant": "fp16"}, "--variant has no effect on .*fox.safetensors"),
    ],
)
def test_flags_that_do_not_go_with_the_base_model_are_named(
    argv: Callable[..., list[str]], file: Path, changes: dict[str, Any], problem: str
) -> None:
    if "pretrained_model_name_or_path" in changes:
        changes = changes | {"pretrained_model_name_or_path": file}
    with pytest.raises(InputError, match=problem):
        main(argv(**changes))
