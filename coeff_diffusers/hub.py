"""Coefficients on the Hugging Face Hub: one commit with the file, its model card and its images, or none."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from torch import nn

from .adapters import DEFAULT_ADAPTER
from .checkpoint import find_file, read_coeff_metadata, save_coeff_weights
from .coeff_file import read_file
from .files import printable
from .model_card import FIGURES, THIS_FOLDER, Card, license_of, with_figures
from .sampling import sampling_defaults

if TYPE_CHECKING:
    from PIL.Image import Image

CARD = "README.md"
OF_A_RUN = ("*.safetensors", "adapter_config.json", "config.yaml", "validation/*/*.png", *FIGURES)


def push_coeff_to_hub(
    model: Any,
    repo_id: str,
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    metadata: Mapping[str, str] | None = None,
    images: Sequence[tuple[str, Image]] = (),
    replace_card: bool = False,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads an adapter, with a model card, to a repository of the Hub, which is made if it is not there.

    All files are one commit: the repository has all of them, or is as it was. (One that was made for it stays.)

    Args:
        model: a diffusers model or a pipeline with the adapter; or the folder that a training run wrote, whose
            weights, model card, settings and validation images are uploaded. The card then gets the repository's
            name, the base model's licence, and `attention_maps.png`, `coefficients.png` and `growth.png`, if the
            folder has them (`coeff-diffusers maps` and `info` draw them).
        repo_id: `user/name`, or the name alone of a repository of the token's user.
        adapter_name: which adapter of the model, active or not.
        metadata: of the file, see [`save_coeff_weights`]; the card shows it as a table, and `instance_prompt` as the
            words that call for the subject.
        images: prompts and the images that they gave, for the card's gallery.
        replace_card: whether a README.md of the repository is replaced. It stays otherwise.
        commit_message: of the commit.
        private: whether a repository that is made is private; as the account has it if not given.
        token: of the account; the one of `hf auth login` if not given.
        revision: the branch to commit to.
        create_pr: makes a pull request of it.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: if there is no such adapter, or a folder holds no coefficients or is given with what it has itself;
            or is no folder; or for images beside a card that stays. Nothing has been sent then.
        TypeError: if `images` are no pairs of a prompt and an image.
        OSError: if the Hub cannot be reached or refuses, or a folder cannot be read.
    """
    with tempfile.TemporaryDirectory() as made:
        if isinstance(model, (str, os.PathLike)):
            _check_alone(adapter_name=adapter_name != DEFAULT_ADAPTER, metadata=metadata, images=images)
            pushed = _of_folder(Path(model))
        else:
            _check_images(images)
            file = save_coeff_weights(model, made, adapter_name=adapter_name, metadata=metadata)
            pushed = _Pushed({file.name: file, **_png_files(images)}, file, model, [prompt for prompt, _ in images])
        api = HfApi(token=token)
        try:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            stays = pushed.card is None and not replace_card and api.file_exists(name, CARD, revision=revision)
            if stays and images:
                raise ValueError(f"{name} has a {CARD} that would not show the images: replace_card=True replaces it")
            card = {} if stays else {CARD: pushed.card_for(name, token).encode()}
            files = [CommitOperationAdd(path, content) for path, content in (pushed.files | card).items()]
            message = commit_message or "Upload attention coefficients"
            commit = api.create_commit(name, files, commit_message=message, revision=revision, create_pr=create_pr)
        except ValueError:
            raise
        except Exception as error:  # of the network library that this huggingface_hub happens to use, too
            raise OSError(f"the adapter could not be pushed to {repo_id!r}: {error}") from error
        return str(commit.pr_url or commit.commit_url)


@dataclass(frozen=True)
class _Pushed:
    """What is uploaded, but for the card: path in the repository -> file or content.

    Args:
        files: the coefficients, and what there is beside them.
        coeff_file: the coefficients.
        model: that they are on, if it is here.
        prompts: of the images in `files`.
        card: of the run that wrote the files, if one did.
    """

    files: dict[str, Any]
    coeff_file: Path
    model: Any = None
    prompts: Sequence[str] = ()
    card: str | None = None

    def card_for(self, repository: str, token: str | bool | None) -> str:
        if self.card is not None:
            text = with_figures(self.card.replace(THIS_FOLDER, repository), self.files)
            return _completed(text, token)
        tensors, header = read_file(self.coeff_file)
        said = header["coeff_diffusers"]["base"].values()
        base = getattr(self.model, "name_or_path", None) or next(
            (base["name"] for base in said if base.get("name")), ""
        )
        is_pipeline = self.model is not None and not isinstance(self.model, nn.Module)
        card = Card(
            base_model=base,
            pipeline_class=type(self.model).__name__ if is_pipeline else "DiffusionPipeline",
            trained={"coefficients": sum(delta.numel() for delta in tensors.values())},
            weights={"coefficients": self.coeff_file.name},
            instance_prompt=header.get("instance_prompt"),
            repository=repository,
            sampling=sampling_defaults(self.model) if is_pipeline else {},
            gallery=[(prompt, f"images/{i}.png") for i, prompt in enumerate(self.prompts)],
            training={name: value for name, value in header.items() if _is_setting(name)},
            license=license_of(base, token, ask_hub=True),
        )
        return with_figures(card.text(repository), self.files)


def _of_folder(folder: Path) -> _Pushed:
    """Of what a training run wrote, or a folder with a coefficient file alone."""
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)} is no folder: give a model, or the folder that a training run wrote")
    found = sorted({path for pattern in OF_A_RUN for path in folder.glob(pattern)})
    file = find_file(folder)
    read_coeff_metadata(file)
    card = folder / CARD
    files = {path.relative_to(folder).as_posix(): path for path in found}
    return _Pushed(files, file, card=card.read_text(encoding="utf-8") if card.exists() else None)


def _completed(text: str, token: str | bool | None) -> str:
    """A card with the licence of its base model, if it has none."""
    card = ModelCard(text)
    base = card.data.get("base_model")
    if not isinstance(base, str) or card.data.get("license"):
        return text
    for name, value in license_of(base, token, ask_hub=True).items():
        card.data[name] = value
    return str(card)


def _png_files(images: Sequence[tuple[str, Image]]) -> dict[str, bytes]:
    files = {}
    for i, (_, image) in enumerate(images):
        data = io.BytesIO()
        image.save(data, format="PNG")
        files[f"images/{i}.png"] = data.getvalue()
    return files


def _check_images(images: Sequence[tuple[str, Image]]) -> None:
    for pair in images:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and hasattr(pair[1], "save")):
            raise TypeError(f"images must be pairs of a prompt and a PIL image, got {pair!r}")


def _is_setting(name: str) -> bool:
    return name not in ("format", "coeff_diffusers", "instance_prompt") and not name.startswith("modelspec.")


def _check_alone(**given: Any) -> None:
    named = [name for name, value in given.items() if value]
    if named:
        raise ValueError(f"a folder is pushed as it is; {' and '.join(named)} can be given of a model's adapter")
