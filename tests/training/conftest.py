"""A tiny Stable Diffusion in a folder, images of a subject, and the script run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import main
from tiny_sd import tiny_pipeline

from coeff_diffusers.training.run.dreambooth import TrainingResult


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-sd"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, not square and all different."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def argv(base: Path, images: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a short run, changed by keyword; `True` gives a flag without value, `None` leaves it out."""

    def build(**changes: Any) -> list[str]:
        settings = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": images,
            "instance_prompt": "a sks fox",
            "output_dir": tmp_path / "out",
            "max_train_steps": 3,
            "train_batch_size": 2,
            "learning_rate": None if changes.get("no_coeff") else 0.05,
            "optimizer": "adamw",  # for a few steps: SOAP's first one only makes its bases
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
        assert result is not None
        return result

    return run
