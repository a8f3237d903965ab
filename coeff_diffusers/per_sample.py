"""One adapter per image of a batch.

An adapter is a few kilobytes beside the weights, so every image of a batch can have its own: in each layer, sample n
takes its matrix out of a stack (samples, H, H).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .adapters import (
    check_enabled,
    components,
    denoisers,
    known_coefficients,
    layer_coefficients,
    out_of_store,
    records_of,
)
from .choice import Choice, Entry, entered, entry_of, is_entered, read_choice
from .images import images_of_call
from .resolved import CHANGES


@contextmanager
def coeff_per_sample(
    model: Any,
    adapter_names: Sequence[str | tuple[str, float] | Mapping[str, float] | None],
    adapter_weights: float | Sequence[float] = 1.0,
) -> Iterator[None]:
    """Inside, each image of a batch has its own adapter, and those that were active rest; afterwards as before.

        with coeff_per_sample(pipe, ["dog", None, "cat"]):
            pipe(["a sks dog", "a dog", "a sks cat"]).images

    That holds for the thread or asyncio task that entered, and for no other. A single call may say it itself:
    `pipe(prompts, cross_attention_kwargs={"coeff": ["dog", None, "cat"]})`.

    In a call of a pipeline, names stand for its prompts (each for all of `num_images_per_prompt`), or for its
    images if there are as many. Batches that guidance doubles or trebles, and guidance in calls of its own, are
    seen to. In a call of a bare model, names stand for its samples; a batch of k times as many is taken as k times
    the same images.

    To train several adapters at once, have the forward pass inside; names are rows of the training batch. Adapters
    with one rate of dropout drop the same entries: those that each would drop in a pass of its own from the same state
    of the random numbers.

    Args:
        model: a diffusers model or a pipeline. Of a model that `torch.compile` returned, that object: other names
            compile nothing again.
        adapter_names: a name for each prompt, image or sample; `None` is the base model, `("dog", 0.8)` a name with
            its weight, `{"dog": 0.5, "cat": 0.5}` a mixture.
        adapter_weights: one finite number for all, or one for each, by which the weights are multiplied.

    Raises:
        ValueError: for an unknown name, weights that do not fit, or coefficients that are disabled; and, by the call
            and before the model computes anything, if there are not as many names as prompts or images, or if another
            pipeline is called that shares the model.
        TypeError: if `adapter_names` is one string.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a list with a name for each image, got {adapter_names!r}")
    entries = list(adapter_names)
    weights = list(adapter_weights) if isinstance(adapter_weights, Iterable) else [adapter_weights] * len(entries)
    if not entries or len(weights) != len(entries) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(entries)} names need as many finite weights, and at least one, got {weights}")
    mixtures = read_choice(entries).mixtures
    choice = Choice(
        tuple(tuple((name, float(part) * weight) for name, part in each) for each, weight in zip(mixtures, weights)),  # type: ignore[arg-type]
        per_image=True,
    )
    names = choice.names
    with CHANGES:
        out_of_store(model, names)
        known_coefficients(model, names)
    parts = denoisers(model)
    _check_elsewhere(model, names)
    check_enabled(model)
    records = tuple(record for record in records_of(model) if any(record.model is part for part in parts.values()))
    for record in records:
        entry = entry_of(record)
        if entry is not None and entry.choice.per_image:
            raise ValueError("coeff_per_sample is in use on this model: leave it before entering it with other names")
        record.entered = True
    with entered(model, records, choice) as here, ExitStack() as undo:
        for component in _other_components(model):
            undo.callback(component.register_forward_pre_hook(_check_early(here)).remove)
        yield


def _check_elsewhere(model: Any, names: Sequence[str]) -> None:
    parts = denoisers(model)
    for component, part in components(model).items():
        known = [] if component in parts else [name for layer in layer_coefficients(part) for name in layer.configs]
        elsewhere = sorted({name for name in names if name in known})
        if elsewhere:
            raise ValueError(f"adapters {elsewhere} are on {component}, too, where images cannot be told apart")


def _other_components(model: Any) -> list[nn.Module]:
    """Those that a pipeline calls before its denoiser, where a wrong number of names should show."""
    parts = denoisers(model)
    components = {} if isinstance(model, nn.Module) else model.components
    return [part for name, part in components.items() if isinstance(part, nn.Module) and name not in parts]


def _check_early(entry: Entry) -> Callable[[nn.Module, Any], None]:
    def check(module: nn.Module, args: Any) -> None:
        if is_entered(entry):  # here, and not in another thread that calls this module
            images_of_call(entry.choice.mixtures, entry.model)

    return check
