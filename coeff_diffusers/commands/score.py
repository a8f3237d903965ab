"""`coeff-diffusers score`: how like its subject, and its prompt, each image is that `generate` wrote.

An image's scores are a row. Each process scores its share of the images and keeps every row on the disk at once; one
process sums up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ..console import escaped_output
from .encoders import Clip, Distance, Encoder, first_token, lpips
from .generate import digest, processes
from .requests import MANIFEST, SUFFIXES, ImageRequest, PromptsError, read_manifest
from .score_files import write_scores

KINDS = ("clip_t", "clip_i", "dino", "dinov2", "lpips", "drift")
ALL, BASE = "all", "base model"  # rows of the table beside those of subjects
Row = dict[str, Any]


@escaped_output()
def main(args: argparse.Namespace) -> dict[str, Any]:
    state = processes()
    images = [image for image, _ in read_manifest(args.images / MANIFEST).values()]
    references = {name: reference_images(Path(folder)) for name, folder in args.reference.items()}
    partners = Partners(images)
    check(images, references, partners, args)
    keys = row_keys(images, references, partners, args)
    known = {} if args.overwrite else read_rows(args.images)
    missing = [image for image in images if keys[image.file_name] not in known]
    state.wait_for_everyone()  # nobody writes rows before all have read them
    if args.overwrite and state.is_main_process:
        for path in row_files(args.images):
            path.unlink()
    state.wait_for_everyone()

    new: dict[str, Row] = {}
    with state.split_between_processes(parts(missing, args.batch_size)) as share, torch.no_grad():
        scorer = Scorer(args, references, partners, state.device) if share else None
        with open(args.images / f"scores-{state.process_index}.jsonl", "a") as file:
            file.write("\n")  # after a line that was not written to its end
            for batch in tqdm(share, desc="batches", disable=not state.is_main_process):
                rows = {keys[row["file_name"]]: row for row in scorer.rows(batch)} if scorer else {}
                file.write("".join(json.dumps([key, row]) + "\n" for key, row in rows.items()))
                file.flush()
                new |= rows
    # of few batches, versions of accelerate give the last one to several processes
    known |= dict(gather_object(list(new.items())))
    result = summary([known[keys[image.file_name]] for image in images], encoders(args))
    if state.is_main_process:
        written = write_scores(result, images, references, args.images)
        print(json.dumps(result["mean"], indent=2) + "\nwrote " + ", ".join(map(str, written)))
    state.destroy_process_group()  # as in generate
    return result


def parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def reference_images(folder: Path) -> list[Path]:
    files = (path for path in folder.glob("*") if path.is_file())
    found = sorted(path for path in files if path.suffix.lower() in (*SUFFIXES, ".jpeg"))
    if not found:
        raise PromptsError(f"--reference: there are no images in {folder}")
    return found


class Partners:
    """What an image is compared with, among the others: by file name."""

    def __init__(self, images: Sequence[ImageRequest]) -> None:
        self._base = {self._seeded(image): image.file_name for image in images if image.coeff is None}
        self._groups: dict[Any, list[str]] = {}
        for image in images:
            self._groups.setdefault(self._group(image), []).append(image.file_name)

    @staticmethod
    def _seeded(image: ImageRequest) -> tuple[Any, ...]:
        return image.prompt, image.negative_prompt, image.seed

    @staticmethod
    def _group(image: ImageRequest) -> tuple[Any, ...]:
        return image.coeff, image.prompt, image.negative_prompt, image.unrelated

    def base(self, image: ImageRequest) -> str | None:
        """The base model's image of the same prompt and seed."""
        return self._base.get(self._seeded(image))

    def others(self, image: ImageRequest) -> list[str]:
        """The images of the same coefficients and prompt with other seeds."""
        return [name for name in self._groups[self._group(image)] if name != image.file_name]


def check(
    images: Sequence[ImageRequest], references: dict[str, list[Path]], partners: Partners, args: argparse.Namespace
) -> None:
    """Raises PromptsError naming images that are missing, and names that manifest or references alone have."""
    folder: Path = args.images
    missing = [image.file_name for image in images if not (folder / image.file_name).is_file()]
    problems = [f"{name} is in the manifest and not in the folder" for name in missing]
    names = dict.fromkeys(image.coeff for image in images if image.coeff is not None and not image.unrelated)
    if references:
        problems += [f"{name} has no reference images: --reference {name}=FOLDER" for name in names
                     if name not in references]  # fmt: skip
    known = ", ".join(names) or "with the base model"
    problems += [f"--reference {name}: no image was made with coefficients of that name, only {known}"
                 for name in references if name not in names]  # fmt: skip
    taken = {image.coeff: None for image in images if image.coeff in (ALL, BASE)}
    problems += [f"coefficients cannot be called {name!r}, as another row of the table is: rename them in {MANIFEST}, "
                 "and in --reference" for name in taken]  # fmt: skip
    drifting = [image for image in images if image.unrelated and image.coeff is not None]
    if args.dinov2_model:
        problems += [
            f"{image.file_name} is unrelated, and there is no image of the base model (coeff null) of its prompt and "
            f"seed {image.seed}" for image in drifting if partners.base(image) is None
        ]  # fmt: skip
    if args.dinov2_model and not references and not drifting:
        problems.append("--dinov2_model compares with images: give --reference, or have unrelated ones made")
    if args.lpips and not any(partners.others(image) for image in images if not image.unrelated):
        problems.append("--lpips compares the images of a prompt: have several made (--num_images_per_prompt)")
    if problems:
        raise PromptsError(f"{folder} cannot be evaluated:\n  " + "\n  ".join(problems))


def encoders(args: argparse.Namespace) -> dict[str, str]:
    """Score -> the encoder that it is of."""
    found = {"clip_t": args.clip_model, "clip_i": args.clip_model, "dino": args.dino_model}
    found |= {"dinov2": args.dinov2_model, "lpips": args.lpips, "drift": args.dinov2_model}
    return {kind: name for kind, name in found.items() if name}


# Rows on the disk


def row_keys(
    images: Sequence[ImageRequest], references: dict[str, list[Path]], partners: Partners, args: argparse.Namespace
) -> dict[str, str]:
    """File name -> a digest of all that its row depends on: encoders, references, the image and those beside it."""
    content = {image.file_name: digest([args.images / image.file_name]) for image in images}
    subjects = {name: digest(files) for name, files in references.items()}
    keys = {}
    for image in images:
        facts: list[Any] = [encoders(args), subjects.get(image.coeff or ""), asdict(image), content[image.file_name]]
        facts.append(content.get(partners.base(image) or "") if args.dinov2_model else None)
        facts.append([content[name] for name in partners.others(image)] if args.lpips else None)
        keys[image.file_name] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return keys


def row_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("scores-*.jsonl"))


def read_rows(folder: Path) -> dict[str, Row]:
    """Key -> row, of all processes of earlier runs. A line that was not written to its end is passed over."""
    found = {}
    for path in row_files(folder):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                key, row = json.loads(line)
                found[str(key)] = dict(row)
            except (ValueError, TypeError):
                continue
    return found


# The scores


class Scorer:
    """The encoders, and the vectors of the references."""

    def __init__(
        self, args: argparse.Namespace, references: dict[str, list[Path]], partners: Partners, device: Any
    ) -> None:
        device = args.device or device
        self.folder: Path = args.images
        self.partners = partners
        self.clip = Clip(args.clip_model, device)
        kinds: dict[str, Encoder] = {"clip_i": self.clip.images}
        if args.dino_model:
            kinds["dino"] = first_token("--dino_model", args.dino_model, device)
        self.dinov2 = first_token("--dinov2_model", args.dinov2_model, device) if args.dinov2_model else None
        if self.dinov2 is not None:
            kinds["dinov2"] = self.dinov2
        self.distance: Distance | None = lpips(args.lpips, device) if args.lpips else None
        self.kinds = kinds if references else {}
        self.wanted: dict[str, dict[str, Tensor]] = {
            kind: {
                name: torch.cat([encode(some) for some in parts(files, args.batch_size)])
                for name, files in references.items()
            }
            for kind, encode in self.kinds.items()
        }

    def rows(self, batch: Sequence[ImageRequest]) -> list[Row]:
        """A row per image: its file, its coefficients, and its scores."""
        names = ("file_name", "coeff", "prompt", "seed", "unrelated")
        rows = [{name: getattr(image, name) for name in names} for image in batch]
        self._add_drift([pair for pair in zip(batch, rows) if pair[0].unrelated and pair[0].coeff is not None])
        subjects = [pair for pair in zip(batch, rows) if not pair[0].unrelated]
        if subjects:
            self._add_likeness(subjects)
        return rows

    def _add_likeness(self, pairs: Sequence[tuple[ImageRequest, Row]]) -> None:
        files = [self.folder / image.file_name for image, _ in pairs]
        texts = self.clip.texts([image.clip_prompt for image, _ in pairs])
        for (_, row), vector, text in zip(pairs, self.clip.images(files), texts):
            row["clip_t"] = float(vector @ text)
        for kind, encode in self.kinds.items():
            for (image, row), vector in zip(pairs, encode(files)):
                if image.coeff in self.wanted[kind]:  # images of the base model have no subject
                    row[kind] = float((self.wanted[kind][image.coeff] @ vector).mean())
        for image, row in pairs:
            others = [self.folder / name for name in self.partners.others(image)]
            if self.distance is not None and others:
                row["lpips"] = self.distance(self.folder / image.file_name, others)

    def _add_drift(self, pairs: Sequence[tuple[ImageRequest, Row]]) -> None:
        if self.dinov2 is None or not pairs:
            return
        files = [self.folder / image.file_name for image, _ in pairs]
        base = [self.folder / str(self.partners.base(image)) for image, _ in pairs]
        for (_, row), vector, other in zip(pairs, self.dinov2(files), self.dinov2(base)):
            row["drift"] = 1.0 - float(vector @ other)


def summary(rows: Sequence[Row], names: dict[str, str]) -> dict[str, Any]:
    """The rows, mean scores by coefficients and over all images that have some, and standard errors over subjects."""
    groups: dict[str, list[Row]] = {ALL: [row for row in rows if row["coeff"]] or list(rows)}
    for row in rows:
        groups.setdefault(row["coeff"] or BASE, []).append(row)
    means = {name: means_of(group) | {"images": len(group)} for name, group in groups.items()}
    subjects = [mean for name, mean in means.items() if name not in (ALL, BASE)]
    errors = {}
    for kind in KINDS:
        found = [mean[kind] for mean in subjects if kind in mean]
        if len(found) > 1:
            errors[kind] = statistics.stdev(found) / math.sqrt(len(found))
    return {
        "encoders": names,
        "mean": means,
        "standard error over subjects": errors,
        "images": sorted(rows, key=lambda row: row["file_name"]),
    }


def means_of(rows: Sequence[Row]) -> dict[str, float]:
    return {kind: statistics.mean(found) for kind in KINDS if (found := [row[kind] for row in rows if kind in row])}
