"""Where the words of a prompt stand among the tokens that a denoiser's attention sees."""

from __future__ import annotations

import re
from typing import Any


def token_positions(pipe: Any, prompt: str, word: str) -> tuple[int, ...]:
    """The positions of a word's tokens in the text that the denoiser of a pipeline is given.

    Args:
        pipe: of Stable Diffusion 1.x, 2.x or XL, PixArt, Stable Diffusion 3 (whose text is CLIP's and, behind it, T5's
            tokens) or FLUX.1 (T5's).
        prompt: as it is handed to the pipeline.
        word: a word or several in a row, as they stand in the prompt; all occurrences are meant.

    Raises:
        ValueError: if the prompt has no such word, its tokens are cut off, or the pipeline is another.
    """
    found = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt)
    spans = [match.span() for match in found]
    if not word or not spans:
        raise ValueError(f"the prompt {prompt!r} has no {word!r}")
    name = type(pipe).__name__
    if name.startswith("StableDiffusion3"):
        clip = _positions(pipe.tokenizer, prompt, spans, pipe.tokenizer.model_max_length)
        if pipe.text_encoder_3 is None:
            t5: list[int] = []
        else:
            t5 = _positions(pipe.tokenizer_3, prompt, spans, None)
        positions = clip + [pipe.tokenizer.model_max_length + position for position in t5]
    elif name.startswith("Flux") and not name.startswith("Flux2"):
        positions = _positions(pipe.tokenizer_2, prompt, spans, None)
    elif name.startswith(("StableDiffusion", "PixArt")):
        limit = pipe.tokenizer.model_max_length if name.startswith("StableDiffusion") else None
        positions = _positions(pipe.tokenizer, prompt, spans, limit)
    else:
        raise ValueError(f"how {name} lays out its text is not known here; give the positions of the word's tokens")
    if not positions:
        raise ValueError(f"the tokens of {word!r} are cut off: the prompt is longer than the text encoder takes")
    return tuple(positions)


def _positions(tokenizer: Any, prompt: str, spans: list[tuple[int, int]], limit: int | None) -> list[int]:
    """Of the tokens that share a letter with one of the spans."""
    offsets = tokenizer(prompt, return_offsets_mapping=True, truncation=limit is not None, max_length=limit)
    return [
        position
        for position, (start, end) in enumerate(offsets["offset_mapping"])
        if start < end and any(start < stop and begin < end for begin, stop in spans)
    ]
