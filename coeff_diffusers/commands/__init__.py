"""The commands of `coeff-diffusers` that run a model: train, generate, score. Those on files are in cli.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..console import hush

NAMES = ("train", "generate", "score")


def run(name: str, argv: Sequence[str]) -> int:
    """Runs one of `NAMES` and returns its exit code. Its modules are loaded once its flags are understood."""
    if name == "train":
        from ..training.__main__ import main

        main(argv)
        return 0
    from . import flags

    args = flags.parse_generate(argv) if name == "generate" else flags.parse_score(argv)
    hush()
    from . import generate, score
    from .requests import PromptsError

    try:
        (generate if name == "generate" else score).main(args)
    except PromptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
