"""What `score` writes: every number as JSON and CSV, the means as a table, and a page with the images."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..training.writing import write_text
from .requests import ImageRequest

NAMES = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "lpips": "LPIPS",
    "drift": "drift",
}
STYLE = """body { font: 14px sans-serif; margin: 2em } img { width: 160px; display: block }
figure { margin: 0; width: 160px }
div { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 1.5em } figcaption { font-size: 11px; color: #555 }
td, th { padding: 2px 10px; text-align: right } td:first-child { text-align: left }"""


def write_scores(
    result: dict[str, Any], images: Sequence[ImageRequest], references: dict[str, list[Path]], folder: Path
) -> list[Path]:
    """Writes `scores.json`, `.csv`, `.md` and `.html` into the images' folder, each whole or not at all."""
    return [
        write_text(json.dumps(result, indent=2) + "\n", folder / "scores.json"),
        write_text(csv_text(result), folder / "scores.csv"),
        write_text(markdown(result), folder / "scores.md"),
        write_text(page(result, images, references, folder), folder / "scores.html"),
    ]


def csv_text(result: dict[str, Any]) -> str:
    """A line per image."""
    columns = ["file_name", "coeff", "prompt", "seed", "unrelated", *kinds(result)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["images"])
    return text.getvalue()


def kinds(result: dict[str, Any]) -> list[str]:
    return [kind for kind in NAMES if any(kind in row for row in result["images"])]


def table(result: dict[str, Any]) -> list[list[str]]:
    """Heading, a row per subject, and all; with the standard error over subjects, where there are several."""
    found, errors = kinds(result), result["standard error over subjects"]
    rows = [["", "images", *(NAMES[kind] for kind in found)]]
    for name, mean in sorted(result["mean"].items(), key=lambda item: (item[0] == "all", item[0])):
        values = [f"{mean[kind]:.3f}" if kind in mean else "" for kind in found]
        if name == "all":
            values = [
                f"{value} ± {errors[kind]:.3f}" if kind in errors else value for kind, value in zip(found, values)
            ]
        rows.append([name, f"{mean['images']:,}", *values])
    return rows


def encoder_lines(result: dict[str, Any]) -> list[str]:
    return [f"{NAMES[kind]}: {name}" for kind, name in result["encoders"].items() if kind in kinds(result)]


def markdown(result: dict[str, Any]) -> str:
    heading, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table(result)]
    line = "|---" * (2 + len(kinds(result))) + "|"
    notes = "Encoders: " + "; ".join(encoder_lines(result)) + ". ±: standard error over subjects.\n"
    return "\n".join([heading, line, *rows, "", notes])


def page(
    result: dict[str, Any], images: Sequence[ImageRequest], references: dict[str, list[Path]], folder: Path
) -> str:
    """The table, and of each subject its reference images and its images, a row per prompt."""
    rows = {row["file_name"]: row for row in result["images"]}
    parts = ["<!doctype html><meta charset='utf-8'><title>scores</title>", f"<style>{STYLE}</style>", "<table>"]
    parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table(result)]
    parts.append(f"</table><p>{escape('; '.join(encoder_lines(result)))}</p>")
    groups: dict[str | None, dict[str, list[ImageRequest]]] = {}
    for image in images:
        groups.setdefault(image.coeff, {}).setdefault(image.prompt, []).append(image)
    for name, prompts in groups.items():
        parts.append(f"<h2>{escape(name or 'base model')}</h2>")
        if name in references:
            parts.append("<div>" + "".join(figure(file, "reference", folder) for file in references[name]) + "</div>")
        for prompt, some in prompts.items():
            shown = [figure(folder / image.file_name, caption(rows[image.file_name]), folder) for image in some]
            parts.append(f"<h4>{escape(prompt)}</h4><div>{''.join(shown)}</div>")
    return "\n".join(parts) + "\n"


def caption(row: dict[str, Any]) -> str:
    scores = [f"{NAMES[kind]} {row[kind]:.3f}" for kind in NAMES if kind in row]
    return ", ".join([f"seed {row['seed']}", *scores])


def figure(file: Path, words: str, folder: Path) -> str:
    try:
        link = quote(Path(os.path.relpath(file, folder)).as_posix())  # a colon, too, which would make it an address
    except ValueError:  # another drive, on Windows
        link = file.resolve().as_uri()
    source = escape(link, quote=True)
    return f"<figure><img loading='lazy' src='{source}'><figcaption>{escape(words)}</figcaption></figure>"
