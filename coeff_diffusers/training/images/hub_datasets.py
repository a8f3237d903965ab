"""Images and captions of a data set, through Hugging Face's datasets library."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import InputError
from ..settings.dreambooth import SubjectSettings
from .files import TrainingImage, open_images

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def dataset_images(settings: SubjectSettings) -> list[TrainingImage]:
    """The images of --dataset_name in its order, each with its caption, or with the prompt of all.

    Raises:
        InputError: if datasets is not installed, there is no such data set or column, or rows have no image or no
            caption, which are named.
    """
    rows = load_rows(settings)
    check_columns(rows, settings)
    prompts = read_prompts(rows, settings)
    images = image_rows(rows, settings)
    sources = (
        (f"{settings.dataset_name}, row {i}", prompt, partial(read_row, images, settings.image_column, i))
        for i, prompt in enumerate(prompts)
    )
    return open_images(sources, "dataset_name")


def read_row(rows: Dataset, column: str, row: int) -> Image.Image:
    """Raises OSError if the row has no image."""
    image: Image.Image | None = rows[row][column]
    if image is None:
        raise OSError(f"{column} is empty")
    return image


def load_rows(settings: SubjectSettings) -> Dataset:
    """The split "train", or the only one that there is; raises InputError if it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("--dataset_name needs datasets: pip install 'coeff_diffusers[datasets]'") from error
    name = str(settings.dataset_name)
    check_path(Path(name), settings)
    try:
        found = _load(settings)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--dataset_name: {name} cannot be loaded: {error}") from error
    splits = found if isinstance(found, dict) else {"train": found}
    if "train" not in splits and len(splits) > 1:
        raise InputError(f"--dataset_name: {name} has no split train, but {', '.join(splits)}")
    rows: Dataset = splits["train"] if "train" in splits else next(iter(splits.values()))
    if not len(rows):
        raise InputError(f"--dataset_name: {name} has no rows")
    return rows


def check_path(path: Path, settings: SubjectSettings) -> None:
    """Raises InputError if this is a file of another kind, or has no configurations and one is asked for."""
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(f"--dataset_name: {path} is a file, but none that ends in .parquet")
    if settings.dataset_config_name and (path.is_file() or is_saved(path)):
        raise InputError(f"--dataset_config_name: {path} has no configurations; leave the flag out")


def is_saved(path: Path) -> bool:
    """Whether this is a folder that `save_to_disk` of the datasets library has written."""
    return any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _load(settings: SubjectSettings) -> Dataset | DatasetDict:
    """By a name on the Hub, or from a folder of images or of data files, a Parquet file, or what was saved."""
    import datasets

    name, cache = str(settings.dataset_name), settings.cache_dir
    if is_saved(Path(name)):
        return datasets.load_from_disk(name)
    if Path(name).is_file():
        return datasets.load_dataset("parquet", data_files=glob.escape(name), cache_dir=cache)
    files = _files_by_split(Path(name).resolve())
    return datasets.load_dataset(name, settings.dataset_config_name, data_files=files, cache_dir=cache)


def _files_by_split(folder: Path) -> dict[str, list[str]] | None:
    """What the library finds in a folder; of one such as `my [dog]`, whose name it would take for a pattern itself."""
    from datasets.data_files import get_data_patterns

    if not folder.is_dir() or not glob.has_magic(str(folder)):
        return None
    escaped = glob.escape(str(folder))
    found = get_data_patterns(escaped).items()
    return {str(split): [f"{escaped}/{pattern}" for pattern in patterns] for split, patterns in found}


def check_columns(rows: Dataset, settings: SubjectSettings) -> None:
    """Raises InputError if a column is not there."""
    for setting in ("image_column", "caption_column"):
        column = getattr(settings, setting)
        if column is not None and column not in rows.column_names:
            raise InputError(
                f"--{setting}: {settings.dataset_name} has no column {column!r}; it has {', '.join(rows.column_names)}"
            )


def image_rows(rows: Dataset, settings: SubjectSettings) -> Dataset:
    """The images alone, from images, encoded bytes or paths; raises InputError if they are something else."""
    import datasets

    column = settings.image_column
    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image())
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"--image_column: {column!r} holds no images but {rows.features[column]}") from error


def read_prompts(rows: Dataset, settings: SubjectSettings) -> Iterator[str]:
    """Of each row; raises InputError naming those without one."""
    if settings.caption_column is None:
        return iter([settings.instance_prompt] * len(rows))
    captions = [text if isinstance(text, str) else "" for text in rows[settings.caption_column]]
    problems = [f"row {i}" for i, caption in enumerate(captions) if not caption.strip()]
    if problems:
        raise InputError(
            f"--caption_column: these rows of {settings.dataset_name} have no text in {settings.caption_column!r}:\n  "
            + "\n  ".join(problems)
        )
    return (caption.strip() for caption in captions)
