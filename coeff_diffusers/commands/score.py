"""`coeff-diffusers score`: how like its subject, and its prompt, each image is that `generate` wrote."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

from ..console import escaped_output
from ..training.images.dreambooth_dataset import upright_rgb
from ..training.writing import write_text
from .generate import processes
from .requests import MANIFEST, SUFFIXES, ImageRequest, PromptsError, read_manifest, value_of

Encoder = Callable[[list[Path]], Tensor]  # images to unit vectors, (B, width)


@escaped_output()
def main(args: argparse.Namespace) -> dict[str, Any]:
    state = processes()
    images = [image for image, _ in read_manifest(args.images / MANIFEST).values()]
    references = {name: reference_images(Path(folder)) for name, folder in args.reference.items()}
    check(images, references, args.images)
    clip = Clip(args.clip_model, args.device or state.device)
    kinds: dict[str, Encoder] = {"clip_i": clip.images} if references else {}
    if args.dino_model:
        kinds["dino"] = dino(args.dino_model, args.device or state.device)
    wanted = {
        kind: {
            name: torch.cat([encode(some) for some in parts(files, args.batch_size)])
            for name, files in references.items()
        }
        for kind, encode in kinds.items()
    }

    rows: list[dict[str, Any]] = []
    with state.split_between_processes(parts(images, args.batch_size)) as share, torch.no_grad():
        for batch in tqdm(share, desc="batches", disable=not state.is_main_process):
            rows += scores(batch, args.images, clip, kinds, wanted)
    # of few batches, versions of accelerate give the last one to several processes
    result = summary(list({row["file_name"]: row for row in gather_object(rows)}.values()))
    if state.is_main_process:
        path = args.images / "scores.json"
        write_text(json.dumps(result, indent=2) + "\n", path)
        print(json.dumps(result["mean"], indent=2) + f"\nwrote {path}")
    state.destroy_process_group()  # as in generate
    return result


def parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def reference_images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in (*SUFFIXES, ".jpeg"))
    if not found:
        raise PromptsError(f"--reference: there are no images in {folder}")
    return found


def check(images: Sequence[ImageRequest], references: dict[str, list[Path]], folder: Path) -> None:
    """Raises PromptsError naming images that are missing, and names that manifest or references alone have."""
    missing = [image.file_name for image in images if not (folder / image.file_name).exists()]
    problems = [f"{name} is in the manifest and not in the folder" for name in missing]
    names = dict.fromkeys(image.coeff for image in images if image.coeff is not None)
    if references:
        problems += [f"{name} has no reference images: --reference {name}=FOLDER" for name in names
                     if name not in references]  # fmt: skip
    known = ", ".join(names) or "with the base model"
    problems += [f"--reference {name}: no image was made with coefficients of that name, only {known}"
                 for name in references if name not in names]  # fmt: skip
    if problems:
        raise PromptsError(f"{folder} cannot be evaluated:\n  " + "\n  ".join(problems))


class Clip:
    """A CLIP model's image and text encoder."""

    def __init__(self, name_or_path: str, device: Any) -> None:
        with value_of("--clip_model"):
            self.model = CLIPModel.from_pretrained(name_or_path).eval()
            self.processor = AutoProcessor.from_pretrained(name_or_path)
        self.model.to(device)

    @torch.no_grad()
    def images(self, files: list[Path]) -> Tensor:
        inputs = self.processor(images=open_all(files), return_tensors="pt").to(self.model.device)
        return F.normalize(vectors(self.model.get_image_features(**inputs)), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(text=prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(vectors(self.model.get_text_features(**inputs.to(self.model.device))), dim=-1)


def vectors(features: Any) -> Tensor:
    """(B, width) of what `get_image_features` answers: a tensor, or since transformers 5 an output that holds one."""
    return features if isinstance(features, Tensor) else features.pooler_output


def dino(name_or_path: str, device: Any) -> Encoder:
    """The first token of a vision transformer."""
    with value_of("--dino_model"):
        model = AutoModel.from_pretrained(name_or_path).eval()
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    model.to(device)

    @torch.no_grad()
    def encode(files: list[Path]) -> Tensor:
        inputs = processor(images=open_all(files), return_tensors="pt").to(device)
        return F.normalize(model(**inputs).last_hidden_state[:, 0], dim=-1)

    return encode


def open_all(files: Sequence[Path]) -> list[Image.Image]:
    """Raises PromptsError naming those that cannot be read as images."""
    images, problems = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(upright_rgb(image, "white"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"{file}: {type(error).__name__}: {error}")
    if problems:
        raise PromptsError("these cannot be read as images:\n  " + "\n  ".join(problems))
    return images


def scores(
    batch: Sequence[ImageRequest],
    folder: Path,
    clip: Clip,
    kinds: dict[str, Encoder],
    wanted: dict[str, dict[str, Tensor]],
) -> list[dict[str, Any]]:
    """A row per image: its file, its coefficients, and its scores."""
    files = [folder / image.file_name for image in batch]
    texts = clip.texts([image.clip_prompt for image in batch])
    rows: list[dict[str, Any]] = [
        {"file_name": image.file_name, "coeff": image.coeff, "clip_t": float(vector @ text)}
        for image, vector, text in zip(batch, clip.images(files), texts)
    ]
    for kind, encode in kinds.items():
        for image, row, vector in zip(batch, rows, encode(files)):
            if image.coeff in wanted[kind]:  # images of the base model have no subject
                row[kind] = float((wanted[kind][image.coeff] @ vector).mean())
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and the mean of each score over all of them and by coefficients."""
    groups: dict[str, list[dict[str, Any]]] = {"all": list(rows)}
    for row in rows:
        groups.setdefault(row["coeff"] or "base model", []).append(row)
    kinds = ("clip_t", "clip_i", "dino")
    means = {
        name: {kind: statistics.mean(found) for kind in kinds if (found := [r[kind] for r in group if kind in r])}
        | {"images": len(group)}
        for name, group in groups.items()
    }
    return {"mean": means, "images": sorted(rows, key=lambda row: row["file_name"])}
