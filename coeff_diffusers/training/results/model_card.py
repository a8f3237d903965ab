"""The model card: README.md of the output folder, in the form that the Hub shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from coeff_diffusers.checkpoint import public_name

from ..families.single_file import is_single_file
from ..writing import write_text

NAMES = {
    "coefficients": "attention coefficients (Coeff-Tuning, arXiv 2503.18337)",
    "lora": "parameters of a LoRA",
    "text_encoder_coefficients": "attention coefficients of the text encoders",
    "text_encoder_lora": "parameters of a LoRA on the text encoders",
}
THIS_FOLDER = "path/to/this/folder"
TAGS = {"coefficients": "coeff-tuning", "lora": "lora"}


def write_card(
    folder: Path,
    *,
    base_model: str,
    pipeline_class: str,
    instance_prompt: str,
    steps: int,
    trained: dict[str, int],
    weights: dict[str, Path],
    validation_prompts: Sequence[str],
    images_per_prompt: int,
    images: list[Path],
    sampling: Mapping[str, Any],
) -> Path:
    """Writes `folder / README.md`.

    Not by diffusers' `load_or_create_model_card`: that looks for a card on the Hub under the folder's name first.

    Args:
        folder: the output folder.
        base_model: `--pretrained_model_name_or_path`.
        pipeline_class: of the base model.
        instance_prompt: that calls for the subject.
        steps: optimizer steps.
        trained: `"coefficients"`, `"lora"`, ... -> the number of trainable parameters.
        weights: `"coefficients"` or `"lora"` or both -> the file.
        validation_prompts: one per row of the grid.
        images_per_prompt: of a row.
        images: the last validation's grid, and its single images row by row; empty if there was none.
        sampling: the base model's own arguments of its call.
    """
    base = public_name(base_model)
    singles = [path.relative_to(folder).as_posix() for path in images[1:]]
    prompts = [prompt for prompt in validation_prompts for _ in range(images_per_prompt)]
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        instance_prompt=instance_prompt,
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in zip(prompts, singles)] or None,
    )
    use = how_to_use(base, pipeline_class, instance_prompt, weights, THIS_FOLDER, is_single_file(base_model), sampling)
    what = " and ".join(f"{count:,} {NAMES[kind]}" for kind, count in sorted(trained.items()))
    parts = [
        f"# {folder.resolve().name}\n\nTrained on images of one subject with coeff_diffusers: {what} beside the "
        f"frozen base model `{base}`, in {steps} steps. The subject is called for by `{instance_prompt}`. All "
        "settings are in `config.yaml`.",
        _images(folder, validation_prompts, images),
        f"## Use\n\n```python\n{use}\n```\n",
    ]
    text = "\n\n".join(parts)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    tags = ["text-to-image", "diffusers", "dreambooth", *(TAGS[kind] for kind in weights)]
    return write_text(str(populate_model_card(card, tags)), folder / "README.md")


def _images(folder: Path, prompts: Sequence[str], images: list[Path]) -> str:
    if not images:
        return "No images were generated after training (`--validation_prompt`)."
    rows = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, 1))
    grid = images[0].relative_to(folder).as_posix()
    return f"![Images of the trained model, a row per prompt]({grid})\n\nThe prompts of the rows:\n\n{rows}"


def how_to_use(
    base_model: str,
    pipeline_class: str,
    instance_prompt: str,
    weights: dict[str, Path],
    folder: str,
    single_file: bool,
    sampling: Mapping[str, Any],
) -> str:
    """Lines of Python that load what was trained, and generate.

    Args:
        base_model: its folder, file, or name on the Hub.
        pipeline_class: of the base model.
        instance_prompt: that calls for the subject.
        weights: `"coefficients"` or `"lora"` or both -> the file.
        folder: that the files are in.
        single_file: whether the base model is one.
        sampling: the base model's own arguments of its call.
    """
    imports, loads = [f"from diffusers import {pipeline_class}"], []
    if "coefficients" in weights:
        imports.insert(0, "from coeff_diffusers import load_coeff_weights")
        loads.append(f"load_coeff_weights(pipe, {_text(folder)})")
    if "lora" in weights:
        if weights["lora"].name == LORA_WEIGHT_NAME_SAFE:
            loads.append(f"pipe.load_lora_weights({_text(folder)}, weight_name={_text(weights['lora'].name)})")
        else:
            imports.append("from peft import PeftModel")
            loads.append(f"PeftModel.from_pretrained(pipe.transformer, {_text(folder)})")
    load = "from_single_file" if single_file else "from_pretrained"
    create = f"pipe = {pipeline_class}.{load}({_text(base_model)})"
    arguments = ", ".join([_text(instance_prompt), *(f"{name}={value!r}" for name, value in sampling.items())])
    return "\n".join([*imports, "", create, *loads, f"image = pipe({arguments}).images[0]"])


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
