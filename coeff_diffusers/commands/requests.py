"""Files of prompts, and the manifest of the images that were made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..training.writing import write_text

MANIFEST = "manifest.jsonl"
SUFFIXES = (".png", ".jpg", ".webp")
SEEDS = range(2**63)  # what torch's generators and a JSON reader of 64 bits both take
NAME_BYTES = 200  # of 255 that file systems allow, with room for what a file is called while it is written


class PromptsError(ValueError):
    """What was given cannot be used. The command line shows the message alone."""


@contextmanager
def value_of(flag: str) -> Iterator[None]:
    """What is said of the value of this flag, as a PromptsError that names the flag."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise PromptsError(f"{flag}: {error}") from error


@dataclass(frozen=True)
class ImageRequest:
    """An image to be made, a line of the manifest.

    Args:
        file_name: in the output folder.
        prompt: what it shows.
        seed: of its first noise.
        negative_prompt: what guidance leads away from; `None` is the pipeline's own default.
        coeff: name of the coefficients that it is made with; `None` is the base model.
        clip_prompt: what `score` compares it with, in the place of `prompt`: without a subject's rare word, say.
        unrelated: whether it shows no subject. `score` then asks only how far it drifts from the base model's image of
            the same prompt and seed.
    """

    file_name: str
    prompt: str
    seed: int
    negative_prompt: str | None
    coeff: str | None
    clip_prompt: str
    unrelated: bool = False


Manifest = dict[str, tuple[ImageRequest, dict[str, Any]]]  # file name -> the image, and what it was made with


def read_prompts(path: Path, adapters: Sequence[str], seed: int, images_per_prompt: int) -> list[ImageRequest]:
    """The found that a file asks for: a prompt per line, or JSON objects, a line each, if it ends in `.jsonl`.

    A JSON line has a `prompt`, and may have `seed`, `negative_prompt`, `coeff`, `clip_prompt`, `file_name` and
    `unrelated`.

    Args:
        path: the file. Empty lines are passed over.
        adapters: the names that `coeff` may have. If there is one, it is that of lines that do not say.
        seed: of the first image of lines that do not say.
        images_per_prompt: found a line, with seeds from the first one upwards.

    Raises:
        PromptsError: listing every line that cannot be used.
    """
    found: list[ImageRequest] = []
    problems = []
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise PromptsError(f"{path} must be a .txt or .jsonl file" + ("" if path.exists() else ", and does not exist"))
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            found += _images(number, _checked(entry, adapters), seed, images_per_prompt)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    names = [image.file_name for image in found]
    problems += [f"{name} would be written {names.count(name)} times" for name in dict.fromkeys(names)
                 if names.count(name) > 1]  # fmt: skip
    if not found and not problems:
        problems = ["there is no prompt in it"]
    if problems:
        raise PromptsError(f"{path} cannot be used:\n  " + "\n  ".join(problems))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with the mark of its encoding
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path} must be in UTF-8: {error}") from error


def _checked(entry: Any, adapters: Sequence[str]) -> dict[str, Any]:
    """The entry with its `coeff` filled in."""
    texts = ("prompt", "negative_prompt", "coeff", "clip_prompt", "file_name")
    kinds = {"seed": int, **dict.fromkeys(texts, str), "unrelated": bool}
    words = {int: "a whole number", str: "text", bool: "true or false"}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError('must be an object with a "prompt"')
    for name, value in entry.items():
        if name not in kinds:
            raise ValueError(f"{name!r} is none of {', '.join(kinds)}")
        if value is not None and type(value) is not kinds[name]:
            raise ValueError(f"{name} must be {words[kinds[name]]}, got {value!r}")
    if entry.get("seed") is not None and entry["seed"] not in SEEDS:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {entry['seed']}")
    if "coeff" not in entry:
        if len(adapters) > 1:
            raise ValueError(
                f'must say which "coeff" it is made with: {", ".join(adapters)}, or null for the base model'
            )
        entry = {**entry, "coeff": adapters[0] if adapters else None}
    if entry["coeff"] not in (None, *adapters):
        raise ValueError(f"coeff {entry['coeff']!r} is none of {', '.join(adapters)}")
    name = entry.get("file_name")
    if name and (Path(name).name != name or Path(name).suffix not in SUFFIXES):
        raise ValueError(f"file_name must be a name without folders that ends in {', '.join(SUFFIXES)}, got {name!r}")
    if name and len(name.encode()) > NAME_BYTES:
        raise ValueError(f"file_name must have at most {NAME_BYTES} bytes, got {len(name.encode())}")
    checked: dict[str, Any] = entry
    return checked


def _images(number: int, entry: dict[str, Any], seed: int, images_per_prompt: int) -> list[ImageRequest]:
    prompt, first = entry["prompt"], seed if entry.get("seed") is None else entry["seed"]
    found = []
    one = images_per_prompt == 1 and entry.get("file_name")
    for s in range(first, first + images_per_prompt):
        name = Path(entry.get("file_name") or f"{number:05d}-{file_name(prompt)}.png")
        found.append(
            ImageRequest(
                file_name=name.name if one else f"{name.stem}-seed{s}{name.suffix}",
                prompt=prompt,
                seed=s,
                negative_prompt=entry.get("negative_prompt"),
                coeff=entry["coeff"],
                clip_prompt=entry.get("clip_prompt") or prompt,
                unrelated=bool(entry.get("unrelated")),
            )
        )
    return found


def file_name(prompt: str) -> str:
    """A prompt as part of a file's name."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80]
    return words.encode()[:120].decode(errors="ignore")  # 80 letters of some scripts are more than a name may have


def write_manifest(entries: Manifest, path: Path) -> None:
    """A line per image, with what it was made with. Whole or not at all."""
    lines = [json.dumps(asdict(image) | {"made_with": made_with}) + "\n" for image, made_with in entries.values()]
    write_text("".join(lines), path)


def read_manifest(path: Path) -> Manifest:
    """Raises PromptsError if the file is no manifest."""
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        names = [field.name for field in fields(ImageRequest)]
        entries = [{"unrelated": False} | entry for entry in entries]  # which earlier releases did not know
        return {e["file_name"]: (ImageRequest(**{name: e[name] for name in names}), e["made_with"]) for e in entries}
    except FileNotFoundError as error:
        raise PromptsError(f"there is no {path}, which coeff-diffusers generate --prompts_file writes") from error
    except (ValueError, TypeError, KeyError) as error:
        raise PromptsError(f"{path} is no manifest of images: {error!r}") from error
