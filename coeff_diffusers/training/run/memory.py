"""What training does not need is not held: text encoders, once every prompt of the run has been encoded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils import checkpoint

from ...quantization import parameter_count
from ..families import Family

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]


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
    _encode_prompts_of(calls, family.denoiser)
    record.encode = None
    names = [name for name in family.text_encoder_names if getattr(pipeline, name, None) is not None]
    family.released += sum(parameter_count(p) for name in names for p in getattr(pipeline, name).parameters())
    pipeline.register_modules(**dict.fromkeys(names))
    free_memory()
    return names


@torch.no_grad()
def release_frozen_text_encoders(
    family: Family, prompts: Iterable[str], calls: Iterable[Callable[[], object]]
) -> None:
    """Where others of the pipeline's text encoders train, leaves the frozen ones' answers in their place.

    Args:
        family: some of whose text encoders train, or all.
        prompts: that are trained on.
        calls: the pipeline's calls that are still to come, as in [`release_text_encoders`].
    """
    there = {name: getattr(family.pipeline, name) for name in family.text_encoder_names}
    trained = [id(encoder) for encoder in family.trained_text_encoders]
    frozen = {name: e for name, e in there.items() if e is not None and id(e) not in trained}
    records = {name: _EncodedTokens(encoder) for name, encoder in frozen.items()}
    if not records:
        return
    family.pipeline.register_modules(**records)
    for prompt in dict.fromkeys(prompts):
        family.encode([prompt])
    _encode_prompts_of(calls, family.denoiser)
    for record in records.values():
        record.encoder = None
    free_memory()


def _encode_prompts_of(calls: Iterable[Callable[[], object]], denoiser: nn.Module) -> None:
    stop = denoiser.register_forward_pre_hook(_stop)
    try:
        for call in calls:
            with suppress(_AboutToDenoise):
                call()
    finally:
        stop.remove()


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


class _EncodedTokens(nn.Module):
    """In the place of a frozen text encoder: answers for the tokens that it has been asked for before, without it.

    Each row is encoded alone, so that an answer does not depend on what else is in a batch.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.config, self.dtype, self.device = encoder.config, encoder.dtype, encoder.device  # that pipelines ask for
        self.answers: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """The last hidden states (B, tokens, width) of tokens (B, tokens)."""
        rows = [tuple(row) for row in input_ids.tolist()]
        for row, ids in zip(rows, input_ids):
            if row not in self.answers:
                if self.encoder is None:
                    raise RuntimeError(
                        "a text encoder that does not train was released when the run's prompts had been encoded, "
                        f"and this one has other tokens: {list(row)}"
                    )
                self.answers[row] = self.encoder(ids[None], *args, **kwargs)[0][0]
        return (torch.stack([self.answers[row] for row in rows]),)


def checkpoint_blocks(denoiser: Any, every: int) -> None:
    """Has the backward pass compute the activations of one block in `every` again, by the order of first calls."""
    numbers: dict[nn.Module, int] = {}

    def call(block: Any, *args: Any) -> Any:
        if isinstance(block, nn.Module) and numbers.setdefault(block, len(numbers)) % every:
            return block(*args)
        return checkpoint.checkpoint(block, *args, use_reentrant=False)

    denoiser.enable_gradient_checkpointing(call)


def offloaded_activations(accelerator: Accelerator) -> Callable[[], AbstractContextManager[Any]]:
    """Inside, what is saved for the backward pass is in the CPU's memory, pinned where that is another's."""
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        accelerator.print("--offload_activations saves nothing here: they are in the CPU's memory.")
    return partial(save_on_cpu, pin_memory=not on_cpu, device_type=accelerator.device.type)


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
    if resource is None:
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
