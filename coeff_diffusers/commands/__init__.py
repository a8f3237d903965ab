"""The commands of `coeff-diffusers`: those that run a model, train, generate and score, and those on files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ..console import hush

OF_MODELS = {
    "train": "trains coefficients, and a LoRA if asked for, on a few images of a subject",
    "generate": "generates images by coefficient files",
    "score": "scores images of generate: CLIP-T, CLIP-I, DINO, DINOv2, LPIPS, drift",
    "maps": "draws where each head looks for a word of the prompt",
    "serve": "serves images of many subjects over HTTP",
    "app": "opens a page to create, look into and train subjects",
}


def run_on_model(name: str, argv: Sequence[str]) -> int:
    """Runs one of `OF_MODELS` and returns its exit code. Its modules are loaded once its flags are understood."""
    if name == "train":
        from ..training.__main__ import main

        main(argv)
        return 0
    if name in ("serve", "app"):
        return until_stopped(name, argv)
    from . import flags

    args = {"generate": flags.parse_generate, "score": flags.parse_score, "maps": flags.parse_maps}[name](argv)
    hush()
    from .requests import PromptsError

    try:
        importlib.import_module(f".{name}", __package__).main(args)
    except PromptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def until_stopped(name: str, argv: Sequence[str]) -> int:
    """Runs the server or the app until it is asked to stop."""
    package = {"serve": "serving", "app": "app"}[name]
    try:
        from ..training.errors import InputError

        settings_module = importlib.import_module(f"..{package}.settings", __package__)
    except ImportError as error:
        return _missing(name, error)
    try:
        settings = getattr(settings_module, f"parse_{name}")(argv)
        hush()
        try:
            run = importlib.import_module(f"..{package}.run", __package__).run
        except ImportError as error:
            return _missing(name, error)
        run(settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _missing(name: str, error: ImportError) -> int:
    print(f"error: {name} needs {error.name}; pip install 'coeff_diffusers[{name}]'", file=sys.stderr)
    return 1
