"""Which image of a call has which adapters, and which sample of a denoiser's batch is of which image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .choice import Mixture
from .running import pipeline_calls

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def images_of_call(mixtures: Sequence[Mixture], model: Any = None) -> Sequence[Mixture]:
    """The mixtures of a running pipeline's images, in the order of its latents: of a prompt one after the other.

    In a call of a bare model, the mixtures as they are. How many prompts and images there are says the pipeline's call
    alone: of a batch of four nobody can tell whether guidance doubled it or each prompt has two images.

    Args:
        mixtures: one for each prompt or image.
        model: what they were entered for, if by a context.

    Raises:
        ValueError: if there are not as many as prompts or images, or they were entered for another pipeline.
    """
    calls = list(pipeline_calls())
    if not calls:
        return mixtures
    if model is not None and not isinstance(model, nn.Module) and all(pipeline is not model for pipeline, _ in calls):
        raise ValueError(
            f"coeff_per_sample was entered for another pipeline, a {type(model).__name__}, than this "
            f"{type(calls[0][0]).__name__}, which shares its model: enter it for the one that is called"
        )
    call = calls[0][1]
    each = next((call[name] for name in _COUNTS if call.get(name)), 1)
    prompt = call.get("prompt")
    prompts = len(prompt) if isinstance(prompt, (list, tuple)) else 1 if isinstance(prompt, str) else None
    if prompts is None and each > 1:
        raise ValueError(
            f"prompts cannot be told from images by prompt_embeds with {each} images a prompt, where each has its own "
            "adapters: give the prompts as text, or repeat prompt_embeds and leave the images a prompt at 1"
        )
    if prompts is not None and len(mixtures) not in (prompts, prompts * each):
        raise ValueError(
            f"adapters are named for {len(mixtures)} images, the call has {prompts} prompts"
            + (f", {each} images each" if each > 1 else "")
        )
    if len(mixtures) == (prompts or 1) * each:
        return mixtures
    return [mixture for mixture in mixtures for _ in range(each)]


def batch_size(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The number of samples that a model is called with."""
    samples = next((kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs), None)
    samples = args[0] if samples is None and args else samples
    if not isinstance(samples, (Tensor, list, tuple)):
        raise ValueError(f"there is no batch of samples among the model's arguments {sorted(kwargs)}")
    return len(samples)
