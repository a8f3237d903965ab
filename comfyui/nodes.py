"""The node: a coefficient file on a model, with a strength. Several nodes in a row add up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths  # of ComfyUI

from coeff_diffusers.coeff_file import read_file

from .apply import apply_coefficients

FOLDER = "coeff"

folder_paths.folder_names_and_paths.setdefault(
    FOLDER, ([os.path.join(folder_paths.models_dir, FOLDER)], {".safetensors"})
)


class LoadCoefficients:
    """Gives a model of SD 1.5, SDXL or FLUX.1 coefficients that were trained by coeff_diffusers."""

    CATEGORY = "model_patches"
    DESCRIPTION = "Attention coefficients (Coeff-Tuning) of a file in models/coeff, beside those that the model has."
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",),
                "coeff_name": (folder_paths.get_filename_list(FOLDER),),
                "strength": ("FLOAT", strength),
                "strict": ("BOOLEAN", {"default": True, "tooltip": "Off: leaves out what does not fit, and logs it."}),
            }
        }

    def load(self, model: Any, coeff_name: str, strength: float, strict: bool) -> tuple[Any]:
        tensors, header = read_file(Path(folder_paths.get_full_path_or_raise(FOLDER, coeff_name)))
        return (apply_coefficients(model, tensors, header, strength, strict),)


NODE_CLASS_MAPPINGS = {"LoadCoefficients": LoadCoefficients}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadCoefficients": "Load Attention Coefficients"}
