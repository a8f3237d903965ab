"""The images of a run's subjects, and of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from PIL import Image

from ..errors import InputError
from ..settings.dreambooth import DreamBoothSettings, ImageSettings, SubjectSettings
from ..settings.rules import parse_words
from ..settings.subjects import Subject, reserved_names
from .augment import captions_of
from .class_images import check_class_folder
from .files import TrainingImage, folder_images, open_images
from .hub_datasets import dataset_images
from .latents import check_cacheable

GivenImages = Sequence["Image.Image | tuple[Image.Image, str]"]


@dataclass(frozen=True)
class SubjectImages:
    """What a subject is trained on.

    Args:
        instance: its images.
        classes: images of its class; none without prior preservation.
    """

    instance: list[TrainingImage]
    classes: list[TrainingImage] = field(default_factory=list)

    def prompts(self, settings: ImageSettings) -> list[str]:
        """All that they may train with, but the empty one."""
        words = parse_words(settings.augment_words)
        captions = (captions_of(image.prompt, settings.augment, words) for image in self.instance)
        return [*chain(*captions), *(image.prompt for image in self.classes)]


def read_images(settings: SubjectSettings, given: GivenImages | None = None) -> list[TrainingImage]:
    """The subject's images, as often as an epoch shows each.

    Args:
        settings: which folder or data set they are in, with which prompts.
        given: the images themselves instead, of Pillow, each alone or with a prompt of its own.

    Raises:
        InputError: if there are none, or some cannot be read or have no prompt; these are named.
    """
    if given is not None:
        if settings.instance_data_dir or settings.dataset_name:
            raise InputError("give either images, or --instance_data_dir or --dataset_name")
        if isinstance(given, Image.Image | str):
            raise InputError(f"images must be a list of Pillow's images, got {given!r}")
        if not given:
            raise InputError("images: there are none")
        pairs = [image if isinstance(image, tuple) else (image, settings.instance_prompt) for image in given]
        if wrong := [f"image {i} is {given[i]!r}" for i, pair in enumerate(pairs) if not _is_image_with_prompt(pair)]:
            raise InputError("images must be Pillow's, or pairs of one and its prompt, but:\n  " + "\n  ".join(wrong))
        sources = [(f"image {i}", prompt, partial(Image.Image.copy, image)) for i, (image, prompt) in enumerate(pairs)]
        images = open_images(sources, "images")
    elif settings.dataset_name is not None:
        images = dataset_images(settings)
    elif settings.instance_data_dir is not None:
        images = folder_images(
            settings.instance_data_dir,
            "instance_data_dir",
            settings.instance_prompt,
            settings.caption_column,
            settings.caption_extension,
        )
    else:
        raise InputError("give either --instance_data_dir or --dataset_name, for the subject's images")
    return images * settings.repeats


def _is_image_with_prompt(pair: Any) -> bool:
    return len(pair) == 2 and isinstance(pair[0], Image.Image) and isinstance(pair[1], str)


def check_images(images: Sequence[TrainingImage], settings: DreamBoothSettings) -> None:
    """Raises InputError if there are class images that cannot be used, or latents that cannot be cached."""
    check_cacheable(images, settings)
    if settings.with_prior_preservation:
        check_cacheable(check_class_folder(settings), settings)


def read_each(subjects: Sequence[Subject], settings: DreamBoothSettings) -> dict[str, list[TrainingImage]]:
    """The images of each of many subjects.

    Args:
        subjects: of the file of `--subjects`.
        settings: of the whole run.

    Raises:
        InputError: with what is wrong with each, or with its name.
    """
    images, problems, reserved = {}, [], reserved_names(settings)
    for subject in subjects:
        name = subject.name
        if use := reserved.get(name.lower()):
            problems.append(f"{name}: this folder of the output folder is for {use}; choose another name")
        try:
            alone = subject.alone(settings)
            images[name] = read_images(alone)
            check_images(images[name], alone)
        except InputError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InputError("--subjects: " + "\n".join(problems))
    return images
