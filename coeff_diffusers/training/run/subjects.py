"""Many subjects at once, over one frozen model: each image of a batch goes through its own subject's coefficients.

Every subject has a data set, an adapter, a loss and a norm of gradients of its own, all as if it were trained alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset

from coeff_diffusers import coeff_per_sample

from ..errors import InputError
from ..families import Family
from ..images.class_images import check_class_folder
from ..images.dreambooth_dataset import Cut, DreamBoothDataset, Example, collate
from ..images.files import TrainingImage, folder_images
from ..images.latents import check_cacheable
from ..settings.config_file import given_twice, yaml_root
from ..settings.dreambooth import DreamBoothSettings
from .checkpoints import NAME as CHECKPOINT
from .losses import dreambooth_loss


@dataclass(frozen=True)
class Subject:
    """An entry of the file of --subjects.

    Args:
        name: of its adapter, and of its folder in the output folder.
        images: the folder with its images, from the file's own folder on.
        prompt: as --instance_prompt.
        caption_column: as --caption_column.
        caption_extension: as --caption_extension.
        validation_prompt: as --validation_prompt.
        class_data_dir: as --class_data_dir, from the file's own folder on.
        class_prompt: as --class_prompt.
    """

    name: str
    images: str
    prompt: str
    caption_column: str | None = None
    caption_extension: str | None = None
    validation_prompt: tuple[str, ...] = ()
    class_data_dir: str | None = None
    class_prompt: str | None = None

    def alone(self, settings: DreamBoothSettings) -> DreamBoothSettings:
        """The settings of the run that trains this subject and no other, to the same coefficients."""
        return replace(
            settings,
            subjects=None,
            resume_from_checkpoint=None,
            instance_data_dir=self.images,
            instance_prompt=self.prompt,
            caption_column=self.caption_column,
            caption_extension=self.caption_extension,
            validation_prompt=self.validation_prompt,
            class_data_dir=self.class_data_dir,
            class_prompt=self.class_prompt,
            output_dir=str(Path(settings.output_dir) / self.name),
        )


def read_subjects(path: str | Path) -> list[Subject]:
    """The subjects of a YAML file: a list, each with the names of [`Subject`]'s arguments.

    Raises:
        InputError: if the file cannot be read or used; everything that is wrong with it is listed.
    """
    with yaml_root(path, "subjects") as (loader, root):
        if not isinstance(root, yaml.SequenceNode) or not root.value:
            raise InputError(f"--subjects: {path} must be a list of subjects, each with name, images and prompt")
        twice = [given_twice(node) if isinstance(node, yaml.MappingNode) else [] for node in root.value]
        entries = loader.construct_document(root)
    problems = [
        f"subject {n}: {problem}"
        for n, (keys, entry) in enumerate(zip(twice, entries), 1)
        for problem in keys + _entry_problems(entry)
    ]
    names = [str(entry.get("name")).lower() for entry in entries if isinstance(entry, dict)]
    problems += [f"{name}: several have this name" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise InputError(f"--subjects: {path}:\n  " + "\n  ".join(problems))
    subjects = [_subject(entry, Path(path).parent) for entry in entries]
    if problems := _class_folder_problems(subjects):
        raise InputError(f"--subjects: {path}:\n  " + "\n  ".join(problems))
    return subjects


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"must have name, images and prompt, got {entry!r}"]
    known = {field.name for field in fields(Subject)}
    problems = [f"has no {name}" for name in ("name", "images", "prompt") if name not in entry]
    problems += [f"{name} is none of {', '.join(sorted(known))}" for name in entry if name not in known]
    for name in known & set(entry):
        values = entry[name] if name == "validation_prompt" and isinstance(entry[name], list) else [entry[name]]
        if not all(isinstance(value, str) and value.strip() for value in values):
            problems.append(f"{name} must be text, got {entry[name]!r}")
    name = entry.get("name")
    if isinstance(name, str) and (not re.fullmatch(r"[\w-]+", name) or CHECKPOINT.fullmatch(name)):
        problems.append(
            f"name must be of letters, digits, - and _, for it names a folder, and not checkpoint-N, got {name!r}"
        )
    return problems


def _subject(entry: dict[str, Any], folder: Path) -> Subject:
    prompts = entry.get("validation_prompt", [])
    prompts = tuple(prompts) if isinstance(prompts, list) else (prompts,)
    folders = {name: str(folder / entry[name]) for name in ("images", "class_data_dir") if name in entry}
    return Subject(**{**entry, **folders, "validation_prompt": prompts})


def _class_folder_problems(subjects: Sequence[Subject]) -> list[str]:
    """Class images are written into their folder, so it must be of one class and of no subject."""
    prompts: dict[Path, set[str | None]] = {}
    for subject in subjects:
        if subject.class_data_dir is not None:
            prompts.setdefault(Path(subject.class_data_dir).resolve(), set()).add(subject.class_prompt)
    shown = {Path(subject.images).resolve() for subject in subjects}
    problems = [f"{folder} has images of a subject, and is a class_data_dir" for folder in prompts if folder in shown]
    return problems + [
        f"{folder} is the class_data_dir of several class_prompt" for folder, of in prompts.items() if len(of) > 1
    ]


def _reserved_names(settings: DreamBoothSettings) -> dict[str, str]:
    """What a run writes itself in the output folder: name in lower case -> what it is."""
    output_dir = Path(settings.output_dir).resolve()
    logging_dir = (output_dir / settings.logging_dir).resolve()
    reserved = {"validation": "the validation images"}
    if logging_dir != output_dir and logging_dir.is_relative_to(output_dir):
        reserved[logging_dir.relative_to(output_dir).parts[0].lower()] = "the log (--logging_dir)"
    return reserved


def read_subject_images(subjects: Sequence[Subject], settings: DreamBoothSettings) -> dict[str, list[TrainingImage]]:
    """Subject -> its images; raises InputError with what is wrong with each, or with its name."""
    images, problems, reserved = {}, [], _reserved_names(settings)
    for subject in subjects:
        if use := reserved.get(subject.name.lower()):
            problems.append(f"{subject.name}: this folder of the output folder is for {use}; choose another name")
        try:
            alone = subject.alone(settings)
            if settings.with_prior_preservation:
                check_cacheable(check_class_folder(alone), settings)
            images[subject.name] = folder_images(
                subject.images, "subjects", subject.prompt, subject.caption_column, subject.caption_extension
            )
        except InputError as error:
            problems.append(f"{subject.name}: {error}")
    if problems:
        raise InputError("--subjects: " + "\n".join(problems))
    return images


class SubjectsDataset(Dataset[dict[str, list[Example]]]):
    """Draw n of each subject: subject -> what its own data set draws.

    Args:
        datasets: subject -> its data set, all of as many draws.
    """

    def __init__(self, datasets: dict[str, DreamBoothDataset]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return min(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, draw: int) -> dict[str, list[Example]]:
        return {name: dataset[draw] for name, dataset in self.datasets.items()}

    # What `encode_cuts` asks of a data set.

    def cuts(self) -> list[Cut]:
        return list(dict.fromkeys(cut for dataset in self.datasets.values() for cut in dataset.cuts()))

    def pixels(self, cut: Cut) -> Tensor:
        return next(iter(self.datasets.values())).pixels(cut)

    @property
    def moments(self) -> dict[Cut, Tensor]:
        return next(iter(self.datasets.values())).moments

    @moments.setter
    def moments(self, moments: dict[Cut, Tensor]) -> None:
        for dataset in self.datasets.values():
            dataset.moments = moments


def collate_subjects(draws: list[dict[str, list[Example]]]) -> dict[str, Any]:
    """A batch, subject after subject, with the subject of each row."""
    names = list(draws[0])
    rows = [draw[name] for name in names for draw in draws]
    kinds = len(rows[0])  # those of the subjects come first, then as many of their classes
    return collate(rows) | {"subjects": [name for name in names for _ in draws] * kinds}


@contextmanager
def own_coefficients(family: Family, batch: dict[str, Any]) -> Iterator[None]:
    """Inside, each row of a batch of several subjects has its subject's coefficients; others have the active ones.

    The backward pass belongs inside, for it may compute activations again.
    """
    if "subjects" not in batch:
        yield
        return
    with coeff_per_sample(family.denoiser, batch["subjects"]):
        yield


def losses_by_subject(errors: Tensor, batch: dict[str, Any], prior_loss_weight: float) -> Tensor:
    """The loss of each subject's rows, (subjects,); of a batch without subjects, (1,).

    Args:
        errors: (B,), of each row.
        batch: as of `collate` or `collate_subjects`.
        prior_loss_weight: as of `dreambooth_loss`.
    """
    subjects = batch.get("subjects", [""] * len(errors))
    losses = []
    for name in dict.fromkeys(subjects):
        rows = [row for row, other in enumerate(subjects) if other == name]
        losses.append(dreambooth_loss(errors[rows], [batch["kinds"][row] for row in rows], prior_loss_weight))
    return torch.stack(losses)


def clip_gradients(groups: Sequence[list[torch.nn.Parameter]], accelerator: Any, max_norm: float) -> None:
    """Each group to a norm of its own."""
    if len(groups) == 1:
        accelerator.clip_grad_norm_(groups[0], max_norm)
        return
    accelerator.unscale_gradients()  # once for all, as accelerate's own clipping would for each
    for group in groups:
        torch.nn.utils.clip_grad_norm_(group, max_norm)
