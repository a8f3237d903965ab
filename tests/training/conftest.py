"""A tiny Stable Diffusion in a folder, pictures of a subject, and the script run in this process."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from train_dreambooth import TrainingResult, main
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 16


def tiny_tokenizer() -> CLIPTokenizer:
    """One token a letter, in the form and with the special tokens of CLIP's."""
    letters = string.ascii_lowercase + string.digits + ",.-'"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=MAX_TOKENS)


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """16-pixel pictures, 8 x 8 latents; 2 and 4 heads."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
    )
    for parameter in unet.parameters():  # large random weights, so that attention shows in the pictures
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-sd"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, not square and all different."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the life of a process, which here has many runs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def argv(base: Path, pictures: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a short run, changed by keyword; `True` gives a flag without value, `None` leaves it out."""

    def build(**changes: Any) -> list[str]:
        settings = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": pictures,
            "instance_prompt": "a sks fox",
            "output_dir": tmp_path / "out",
            "max_train_steps": 3,
            "train_batch_size": 2,
            "learning_rate": 0.05,
            "seed": 0,
            "report_to": "none",
            **changes,
        }
        flags: list[str] = []
        for name, value in settings.items():
            if value is None or value is False:
                continue
            values = [] if value is True else value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
        return flags

    return build


@pytest.fixture
def train(argv: Callable[..., list[str]]) -> Callable[..., TrainingResult]:
    """Runs the script with changed flags."""

    def run(**changes: Any) -> TrainingResult:
        result = main(argv(**changes))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert result is not None
        return result

    return run
