"""The model card: a README.md as the Hub shows it for an adapter, with a gallery and lines of Python that work."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard, ModelCardData

from .checkpoint import COEFF_WEIGHT_NAME, public_name

NAMES = {
    "coefficients": "attention coefficients (Coeff-Tuning, arXiv 2503.18337)",
    "lora": "parameters of a LoRA",
    "text_encoder_coefficients": "attention coefficients of the text encoders",
    "text_encoder_lora": "parameters of a LoRA on the text encoders",
}
TAGS = {"coefficients": "coeff-tuning", "lora": "lora"}
THIS_FOLDER = "path/to/this/folder"
FIGURES = {  # in the folder of a run, by the commands `maps` and `info`
    "attention_maps.png": "Where heads look for a word of the prompt, before mixing and after: red where they take its"
    " values, blue where they take them away.",
    "coefficients.png": "The coefficients of each layer: rows are output heads, columns the maps that they take.",
    "growth.png": "How large the coefficients of each layer became over the steps.",
}


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        base_model: the folder, file or name on the Hub that the base model was loaded from; empty if unknown.
        pipeline_class: that loads it.
        trained: `"coefficients"`, `"lora"`, ... -> the number of trainable parameters.
        weights: `"coefficients"` or `"lora"` or both -> the name of the file.
        instance_prompt: that calls for the subject, if one does.
        repository: that the card is for, `user/name`; without, the snippet loads from `path/to/this/folder`.
        single_file: whether the base model is one.
        sampling: the base model's own arguments of its call.
        gallery: prompts and the images that they gave, by path in the repository.
        grid: path of an image of all of them, and the prompts of its rows.
        training: setting -> value, for the table.
        license: what the base model's own card says of its licence, see [`license_of`].
    """

    base_model: str
    pipeline_class: str
    trained: Mapping[str, int]
    weights: Mapping[str, str]
    instance_prompt: str | None = None
    repository: str | None = None
    single_file: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    gallery: Sequence[tuple[str, str]] = ()
    grid: tuple[str, Sequence[str]] | None = None
    training: Mapping[str, str] = field(default_factory=dict)
    license: Mapping[str, str] = field(default_factory=dict)

    def text(self, title: str) -> str:
        """The card, in Markdown below its lines of YAML."""
        parts = [
            f"# {title}",
            "<Gallery />" if self.gallery else "",
            f"## Model description\n\n{self._description()}",
            self._trigger(),
            self._images(),
            f"## Use\n\n```bash\n{self._install()}\n```\n\n```python\n{self.snippet()}\n```",
            self._table(),
        ]
        body = "\n\n".join(part for part in parts if part)
        return str(ModelCard(f"---\n{self._data().to_yaml()}\n---\n\n{body}\n"))

    def snippet(self, base_model: str | None = None, folder: str | None = None) -> str:
        """Lines of Python that load what was trained, and generate.

        Args:
            base_model: as it is written there; its public name by default.
            folder: that the files are in; the repository by default.
        """
        base = _text(base_model or public_name(self.base_model) or "path/to/the/base/model")
        where = _text(folder or self.repository or THIS_FOLDER)
        imports, loads = [f"from diffusers import {self.pipeline_class}"], []
        if "coefficients" in self.weights:
            imports.insert(0, "from coeff_diffusers import load_coeff_weights")
            loads.append(f"load_coeff_weights(pipe, {where}{self._weight_name()})")
        if self.weights.get("lora") == LORA_WEIGHT_NAME_SAFE:
            loads.append(f"pipe.load_lora_weights({where}, weight_name={_text(LORA_WEIGHT_NAME_SAFE)})")
        elif "lora" in self.weights:
            imports.append("from peft import PeftModel")
            loads.append(f"PeftModel.from_pretrained(pipe.transformer, {where})")
        create = (
            f"pipe = {self.pipeline_class}.{'from_single_file' if self.single_file else 'from_pretrained'}({base})"
        )
        sampling = [f"{name}={value!r}" for name, value in self.sampling.items()]
        call = ", ".join([_text(self.instance_prompt or "a photo"), *sampling])
        return "\n".join([*imports, "", create, *loads, f"image = pipe({call}).images[0]"])

    def _weight_name(self) -> str:
        name = self.weights["coefficients"]
        return "" if name == COEFF_WEIGHT_NAME else f", weight_name={_text(name)}"

    def _data(self) -> ModelCardData:
        """Without `library_name`: diffusers' `from_pretrained` cannot load such a repository."""
        base = name_on_hub(self.base_model)
        more: dict[str, Any] = {"base_model_relation": "adapter"} if base else {}
        if self.instance_prompt:
            more["instance_prompt"] = self.instance_prompt
        shown: list[dict[str, Any]] = [{"text": prompt, "output": {"url": path}} for prompt, path in self.gallery]
        if shown or self.instance_prompt:
            more["widget"] = shown or [{"text": self.instance_prompt}]
        tags = ["text-to-image", "diffusers", "dreambooth", *(TAGS[kind] for kind in self.weights)]
        layout = "template:sd-lora"  # the Hub's own for adapters of images: a gallery, and the words that call for it
        return ModelCardData(
            base_model=base, pipeline_tag="text-to-image", tags=[*tags, layout], **more, **dict[str, Any](self.license)
        )

    def _description(self) -> str:
        what = " and ".join(f"{count:,} {NAMES[kind]}" for kind, count in sorted(self.trained.items()))
        base = public_name(self.base_model)
        link = f"[`{base}`](https://huggingface.co/{base})" if name_on_hub(self.base_model) else f"`{base}`"
        beside = f"the frozen base model {link}" if base else "a frozen base model that has no name"
        project = project_address()
        by = f"[coeff_diffusers]({project})" if project else "coeff_diffusers"
        local = "" if not base or name_on_hub(self.base_model) else " It is a model of the author's, not on the Hub."
        return f"{what[:1].upper()}{what[1:]} beside {beside}, trained by {by}.{local}"

    def _trigger(self) -> str:
        return f"## Trigger words\n\nThe subject is called for by `{self.instance_prompt}`." * bool(
            self.instance_prompt
        )

    def _images(self) -> str:
        if self.grid is None:
            return ""
        path, prompts = self.grid
        rows = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, 1))
        image = f"![Images of the trained model, a row per prompt]({path})"
        return f"## Images\n\n{image}\n\nThe prompts of the rows:\n\n{rows}"

    def _install(self) -> str:
        return f"pip install coeff_diffusers{' peft' if 'lora' in self.weights else ''}"

    def _table(self) -> str:
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in self.training.items()]
        return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows]) if rows else ""


def with_figures(text: str, names: Collection[str]) -> str:
    """A card that also shows those of `FIGURES` that are in the repository and not in the card yet, above its use."""
    shown = [f"{said}\n\n![{said}]({name})" for name, said in FIGURES.items() if name in names and name not in text]
    if not shown:
        return text
    above, use, below = text.partition("\n## Use\n")
    return "\n\n".join([above.rstrip("\n"), "## What it does to attention", *shown]) + "\n" + use + below


def name_on_hub(base_model: str) -> str | None:
    """The base model's name on the Hub; `None` of a local folder or file that was not downloaded from there."""
    name = public_name(base_model)
    return name if name.count("/") == 1 and not Path(name).is_absolute() else None


def license_of(base_model: str, token: str | bool | None = None, *, ask_hub: bool = False) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the base model's own card says; empty if it cannot be had.

    Args:
        base_model: a folder, whose README.md is read, or a name on the Hub.
        token: of the Hub.
        ask_hub: reads the card there, if the folder has none.
    """
    name, card = name_on_hub(base_model), Path(base_model) / "README.md"
    try:
        if card.is_file():
            data = ModelCard.load(card).data.to_dict()
        elif name and ask_hub:
            data = ModelCard.load(name, token=token).data.to_dict()  # type: ignore[arg-type]
        else:
            return {}
    except Exception:  # of the network, or a card whose YAML is broken: the licence is then not known
        return {}
    found = {key: str(data[key]) for key in ("license", "license_name", "license_link") if data.get(key)}
    if name and "://" not in found.get("license_link", "://"):
        found["license_link"] = f"https://huggingface.co/{name}/blob/main/{found['license_link']}"
    return found


def project_address() -> str | None:
    """The project's page, as the installed package says; `None` where it was copied, not installed."""
    try:
        urls = metadata.metadata("coeff_diffusers").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    return next((url.partition(", ")[2] for url in urls if url.startswith("Repository,")), None)


def _cell(value: str) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
