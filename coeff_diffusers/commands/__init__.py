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
}


def run_on_model(name: str, argv: Sequence[str]) -> int:
    """Runs one of `OF_MODELS` and returns its exit code. Its modules are loaded once its flags are understood."""
    if name == "train":
        from ..training.__main__ import main

        main(argv)
        return 0
    if name == "serve":
        return serve(argv)
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


def serve(argv: Sequence[str]) -> int:
    """Serves until it is asked to stop."""
    try:
        from ..serving.settings import parse_serve
        from ..training.errors import InputError
    except ImportError as error:
        return _no_serve(error)
    try:
        settings = parse_serve(argv)
        try:
            from ..serving.run import run
        except ImportError as error:
            return _no_serve(error)
        run(settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _no_serve(error: ImportError) -> int:
    print(f"error: serve needs {error.name}; pip install 'coeff_diffusers[serve]'", file=sys.stderr)
    return 1
