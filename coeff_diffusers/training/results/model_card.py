"""The model card of a run: README.md of the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coeff_diffusers.model_card import Card, license_of

from ..families.single_file import is_single_file
from ..images.augment import plain
from ..settings.dreambooth import DreamBoothSettings
from ..writing import write_text


def card_of_run(
    settings: DreamBoothSettings,
    *,
    repository: str | None,
    pipeline_class: str,
    trained: dict[str, int],
    weights: dict[str, Path],
    validation_prompts: Sequence[str],
    images: list[Path],
    sampling: Mapping[str, Any],
    training: Mapping[str, str],
) -> Card:
    """What the card of a subject says.

    Args:
        settings: of the run that trains it alone.
        repository: on the Hub that the run is pushed to; the base model's card is then asked for its licence there.
        pipeline_class: of the base model.
        trained: `"coefficients"`, `"lora"`, ... -> the number of trainable parameters.
        weights: `"coefficients"` or `"lora"` or both -> the file.
        validation_prompts: one per row of the grid.
        images: the last validation's grid, and its single images row by row; empty if there was none.
        sampling: the base model's own arguments of its call.
        training: setting -> value, for the table.
    """
    folder, base = Path(settings.output_dir), settings.pretrained_model_name_or_path
    paths = [path.relative_to(folder).as_posix() for path in images]
    prompts = [prompt for prompt in validation_prompts for _ in range(settings.num_validation_images)]
    return Card(
        base_model=base,
        pipeline_class=pipeline_class,
        trained=trained,
        weights={kind: file.name for kind, file in weights.items()},
        instance_prompt=plain(settings.instance_prompt),
        repository=repository,
        single_file=is_single_file(base),
        sampling=sampling,
        gallery=list(zip(prompts, paths[1:])),
        grid=(paths[0], validation_prompts) if paths else None,
        training={name: value for name, value in training.items() if name not in ("instance_prompt", "class_prompt")},
        license=license_of(base, settings.hub_token, ask_hub=repository is not None),
    )


def write_card(card: Card, folder: Path) -> Path:
    """Writes `folder / README.md`.

    Not by diffusers' `load_or_create_model_card`: that looks for a card on the Hub under the folder's name first.
    """
    return write_text(card.text(card.repository or folder.resolve().name), folder / "README.md")
