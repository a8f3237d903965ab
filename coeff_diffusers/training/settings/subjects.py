"""The file of `--subjects`: many subjects that are trained at once, each with its images and prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from .config_file import given_twice, yaml_root
from .dreambooth import DreamBoothSettings, OutputSettings


@dataclass(frozen=True)
class Subject:
    """An entry of the file of `--subjects`.

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
    for each in known & set(entry):
        values = entry[each] if each == "validation_prompt" and isinstance(entry[each], list) else [entry[each]]
        if not all(isinstance(value, str) and value.strip() for value in values):
            problems.append(f"{each} must be text, got {entry[each]!r}")
    name = entry.get("name")
    if isinstance(name, str) and (not re.fullmatch(r"[\w-]+", name) or re.fullmatch(r"checkpoint-\d+", name)):
        problems.append(
            f"name must be of letters, digits, - and _, for it names a folder, and not checkpoint-N, got {name!r}"
        )
    return problems


def _subject(entry: dict[str, Any], folder: Path) -> Subject:
    prompts = entry.get("validation_prompt", [])
    prompts = tuple(prompts) if isinstance(prompts, list) else (prompts,)
    folders = {name: str(folder / entry[name]) for name in ("images", "class_data_dir") if name in entry}
    return Subject(**(entry | folders | {"validation_prompt": prompts}))


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


def reserved_names(settings: OutputSettings) -> dict[str, str]:
    """What a run writes itself in the output folder: name in lower case -> what it is."""
    output_dir = Path(settings.output_dir).resolve()
    logging_dir = (output_dir / settings.logging_dir).resolve()
    reserved = {"validation": "the validation images"}
    if logging_dir != output_dir and logging_dir.is_relative_to(output_dir):
        reserved[logging_dir.relative_to(output_dir).parts[0].lower()] = "the log (--logging_dir)"
    return reserved
