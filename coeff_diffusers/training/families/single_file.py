"""A base model in a single file, as models are handed around, by diffusers' `from_single_file`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open

from ...quantization import Quantization, bitsandbytes_on_cpu


def is_single_file(name: str) -> bool:
    return Path(name).is_file()


def single_file_config(file: str, config: str | None, **hub: Any) -> tuple[str, dict[str, Any]]:
    """Where the configs of the file's parts are taken from, and what the pipeline's says.

    Args:
        file: of weights, in one of the original formats.
        config: a folder in diffusers format, or a name on the Hub. Without one, diffusers' own choice by the file's
            keys: the published model of its kind, on the Hub.
        **hub: of `load_config`.

    Raises:
        ValueError: if it cannot be told, with ways out.
    """
    try:
        if Path(file).suffix != ".safetensors":
            raise ValueError("it does not end in .safetensors")
        if config is None:
            with safe_open(file, "pt") as opened:
                shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
            empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
            config = str(fetch_diffusers_config(empty)["pretrained_model_name_or_path"])
        return config, diffusers.DiffusionPipeline.load_config(config, **hub)
    except Exception as error:
        raise _unusable(file, error) from error


def load_single_file(
    file: str,
    config: str | None,
    *,
    dtype: torch.dtype,
    quantization: Quantization,
    device: torch.device | str,
    **arguments: Any,
) -> Any:
    """The pipeline; what its file lacks, such as FLUX's text encoders, is taken from `config`, if that is a folder.

    Args:
        file: as in [`single_file_config`].
        config: likewise.
        dtype: of all that is not quantised.
        quantization: of the denoiser and the large text encoders.
        device: that these are quantised on.
        **arguments: of `from_single_file`.

    Raises:
        ValueError: if it cannot be loaded, with ways out.
    """
    config, index = single_file_config(file, config)
    try:
        lacking = {name: said for name, said in index.items() if name not in arguments}
        with bitsandbytes_on_cpu():
            arguments |= quantization.single_file_parts(lacking, file, config, dtype, str(device))
        pipeline = getattr(diffusers, index["_class_name"]).from_single_file(
            file, config=config, dtype=dtype, **arguments
        )
        parts: dict[str, Any] = {
            name: part
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module) and name in lacking
        }
        absent = [f"{name}.{key}" for name, part in parts.items() for key, p in part.named_parameters() if p.is_meta]
        if absent:
            raise ValueError(f"it lacks {', '.join(absent)}")
    except Exception as error:  # what the conversion meets in a file of another kind is anything
        raise _unusable(file, error, index["_class_name"]) from error
    for part in parts.values():
        if isinstance(part, diffusers.ModelMixin):
            part.register_to_config(_name_or_path=file)  # type: ignore[attr-defined]  # as from_pretrained has it, for files of coefficients
    return pipeline


def _unusable(file: str, error: Exception, pipeline: str = "StableDiffusionPipeline") -> ValueError:
    return ValueError(
        f"{file} cannot be loaded as a base model in a single file: {type(error).__name__}: {error}\n"
        "Give a folder in diffusers format of a model of its kind by --single_file_config; or convert it once, by the "
        "pipeline of its kind, where the Hub can be reached, and give the folder:\n"
        f"  pipe = diffusers.{pipeline}.from_single_file({file!r})\n"
        f"  pipe.save_pretrained({str(Path(file).with_suffix(''))!r})"
    )
