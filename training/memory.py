"""What training does not need is not held: text encoders, once every prompt of the run has been encoded."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from families import Family


def release_text_encoders(family: Family, calls: Iterable[Callable[[], object]]) -> list[str]:
    """Takes the text encoders out of the pipeline, which goes on answering for the prompts that it has encoded.

    Args:
        family: whose `remember_prompts` has seen what is trained on.
        calls: the pipeline's calls that are still to come. They are stopped before they denoise, so that they take no
            longer than encoding their prompts.

    Returns:
        The names of the components that were taken out.
    """
    pipeline = family.pipeline
    record = _EncodedPrompts(pipeline.encode_prompt)
    pipeline.encode_prompt = record
    stop = family.denoiser.register_forward_pre_hook(_stop)
    try:
        for call in calls:
            with suppress(_AboutToDenoise):
                call()
    finally:
        stop.remove()
    record.encode = None
    names = [name for name in family.text_encoder_names if getattr(pipeline, name, None) is not None]
    pipeline.register_modules(**dict.fromkeys(names))
    free_memory()
    return names


class _AboutToDenoise(Exception):  # noqa: N818
    """The prompts are encoded, and the pipeline is about to denoise."""


def _stop(*args: Any) -> None:
    raise _AboutToDenoise


class _EncodedPrompts:
    """In the place of a pipeline's `encode_prompt`: answers what it has been asked before without the encoders."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self.encode: Callable[..., Any] | None = encode
        self.answers: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = repr((args, sorted(kwargs.items())))
        if asked not in self.answers:
            if self.encode is None:
                raise RuntimeError(
                    "the text encoders were released when the prompts of the run had been encoded, and this call has "
                    f"another: {asked}"
                )
            self.answers[asked] = self.encode(*args, **kwargs)
        return self.answers[asked]


def peak_memory_text(accelerator: Accelerator) -> str:
    """The peak so far: of the device's memory, or of the process's own on a CPU; the largest of all processes."""
    peak, device = peak_memory(accelerator.device), accelerator.device.type
    where = f"memory of the {'process' if device == 'cpu' else device}"
    if accelerator.num_processes > 1:
        peak = max(accelerator.gather(torch.tensor([peak], device=accelerator.device)).tolist())
        where += f", the largest of {accelerator.num_processes}"
    return f"Peak {where}: {peak / 2**30:.2f} GiB."


def peak_memory(device: torch.device) -> int:
    """Bytes, of this process alone."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
