"""Images in files, for tests."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from coeff_diffusers.training.images.files import TrainingImage, file_images

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(path: Path, size: tuple[int, int] = (6, 4), color: tuple[int, int, int] = RED) -> Path:
    """An image of one colour; `size` is width and height."""
    Image.new("RGB", size, color).save(path)
    return path


def opened(paths: list[Path]) -> list[TrainingImage]:
    """Each with a prompt of its own: `"a <file's name>"`."""
    return file_images({path: f"a {path.stem}" for path in paths}, "instance_data_dir")
