"""One adapter per picture of a batch.

An adapter is a few kilobytes beside the weights, so every picture of a batch can have its own: in each layer, sample n
takes its matrix out of a stack (samples, H, H).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import coeff_processors, components, denoisers, known_processors
from .processor import CoeffAttnProcessor

Pictures = list[tuple[str, float]]  # adapter, "" for none, and weight of each


@contextmanager
def coeff_per_sample(
    model: Any, adapter_names: Sequence[str | None], adapter_weights: float | Sequence[float] = 1.0
) -> Iterator[None]:
    """Inside, each picture of a batch has its own adapter, and those that were active rest; afterwards as before.

        with coeff_per_sample(pipe, ["dog", None, "cat"]):
            pipe(["a sks dog", "a dog", "a sks cat"]).images

    In a call of a pipeline, names stand for its prompts (each for all of `num_images_per_prompt`), or for its
    pictures if there are as many. Batches that guidance doubles or trebles, and guidance in calls of its own, are
    seen to. In a call of a bare model, names stand for its samples; a batch of k times as many is taken as k times
    the same pictures.

    To train several adapters at once, have forward and backward pass inside; names are rows of the training batch.
    Adapters with one rate of dropout drop the same entries: those that each would drop in a pass of its own from the
    same state of the random numbers.

    Args:
        model: a diffusers model or a pipeline. Of a model that `torch.compile` returned, that object: other names
            compile nothing again.
        adapter_names: a name for each prompt, picture or sample; `None` is the base model.
        adapter_weights: one finite number for all, or one for each.

    Raises:
        ValueError: for an unknown name, weights that do not fit, or coefficients that are disabled; and, by the call
            and before the model computes anything, if there are not as many names as prompts or pictures.
        TypeError: if `adapter_names` is one string.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a list with a name for each picture, got {adapter_names!r}")
    names = list(adapter_names)
    known_processors(model, [name for name in dict.fromkeys(names) if name is not None])
    weights = list(adapter_weights) if isinstance(adapter_weights, Iterable) else [adapter_weights] * len(names)
    if not names or len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(names)} names need as many finite weights, and at least one, got {weights}")
    processors = _denoising_processors(model, names)
    if any(not processor.enabled for processor in processors):
        raise ValueError("coefficients are disabled, so that no name would count: enable_coeff_adapters(model) first")
    if any(processor.per_sample is not None for processor in processors):
        raise ValueError("coeff_per_sample is in use on this model: leave it before entering it with other names")

    pictures = [(name or "", weight) for name, weight in zip(names, weights)]
    with ExitStack() as undo:
        for processor in processors:  # no samples, until the model is called
            processor.per_sample = torch.empty(0, processor.num_heads, processor.num_heads)
        undo.callback(_reset, processors)
        for called, part in _called_objects(model):
            undo.callback(_before_calls(called, _Samples(model, part, pictures)))
        for component in _other_components(model):
            undo.callback(_before_calls(component, lambda args, kwargs: _of_running_call(model, pictures)))
        yield


def _denoising_processors(model: Any, names: Sequence[str | None]) -> list[CoeffAttnProcessor]:
    parts = set(denoisers(model).values())
    for component, part in components(model).items():
        known = [] if part in parts else [name for processor in coeff_processors(part) for name in processor.coeff]
        elsewhere = sorted({name for name in names if name in known})
        if elsewhere:
            raise ValueError(f"adapters {elsewhere} are on {component}, too, where pictures cannot be told apart")
    return [processor for part in parts for processor in coeff_processors(part)]


class _Samples:
    """Gives a model's processors, before it is called, a matrix for each sample of the batch."""

    def __init__(self, model: Any, part: nn.Module, pictures: Pictures) -> None:
        self.model, self.part, self.pictures = model, part, pictures
        self.processors = coeff_processors(part)
        self.current: Any = None

    def __call__(self, args: Any, kwargs: dict[str, Any]) -> None:
        pictures = _of_running_call(self.model, self.pictures)
        batch = _batch_size(args, kwargs)
        if batch % len(pictures):
            raise ValueError(
                f"{type(self.part).__name__} was called with a batch of {batch}, which is no multiple of the "
                f"{len(pictures)} pictures that coeff_per_sample names"
            )
        used = [p.coeff[name] for p in self.processors for name, _ in pictures if name in p.coeff]
        wanted = pictures, batch, [parameter._version for parameter in used]
        if wanted == self.current and not torch.is_grad_enabled():
            return  # the same as in the step before
        for processor in self.processors:
            times = batch // len(pictures)
            processor.per_sample = _stack(processor, pictures).repeat(times, 1, 1)
            processor.per_sample_dropout = [_dropout(processor, name) for name, _ in pictures] * times
        self.current = wanted


def _stack(processor: CoeffAttnProcessor, pictures: Pictures) -> Tensor:
    """weight * Delta of each picture's adapter, zeros where it has none here: (pictures, H, H)."""
    device = next(iter(processor.coeff.values())).device
    zeros = torch.zeros(processor.num_heads, processor.num_heads, device=device)
    return torch.stack(
        [weight * processor.coeff[name] if name in processor.coeff else zeros for name, weight in pictures]
    )


def _dropout(processor: CoeffAttnProcessor, name: str) -> float:
    return processor.configs[name].dropout if name in processor.configs else 0.0


def _of_running_call(model: Any, pictures: Pictures) -> Pictures:
    """The pictures of the pipeline call that is running, in the order of its latents."""
    call = _running_call(model)
    counts = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
    each = next((call[name] for name in counts if call.get(name)), 1)
    prompt = call.get("prompt")
    prompts = len(prompt) if isinstance(prompt, (list, tuple)) else 1 if isinstance(prompt, str) else None
    if prompts is None and each > 1:
        raise ValueError(
            f"coeff_per_sample cannot tell prompts from pictures by prompt_embeds with {each} pictures a prompt: give "
            "the prompts as text, or repeat prompt_embeds and leave the pictures a prompt at 1"
        )
    if prompts is not None and len(pictures) not in (prompts, prompts * each):
        raise ValueError(
            f"coeff_per_sample names {len(pictures)} pictures, the call has {prompts} prompts"
            + (f", {each} pictures each" if each > 1 else "")
        )
    return pictures if len(pictures) == (prompts or 1) * each else [p for p in pictures for _ in range(each)]


def _running_call(model: Any) -> dict[str, Any]:
    """The arguments of the pipeline's call that is running; empty if none is.

    A denoiser gets a batch of which it cannot be told whether guidance doubled it or each prompt has two pictures, and
    pipelines keep the number of pictures in a local variable of their `__call__`. So it is read from there.
    """
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is model:
            return {**frame.f_locals.get("kwargs", {}), **frame.f_locals}
    return {}


def _batch_size(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    samples = next((kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs), None)
    samples = args[0] if samples is None and args else samples
    if not isinstance(samples, (Tensor, list, tuple)):
        raise ValueError(f"coeff_per_sample finds no batch of samples among the model's arguments {sorted(kwargs)}")
    return len(samples)


def _called_objects(model: Any) -> list[tuple[nn.Module, nn.Module]]:
    """What is called, which may be compiled or wrapped, and the denoiser in it."""
    parts = denoisers(model)
    if isinstance(model, nn.Module):
        return [(model, part) for part in parts.values()]
    return [(model.components[name], part) for name, part in parts.items()]


def _other_components(model: Any) -> list[nn.Module]:
    """Those that a pipeline calls before its denoiser, where a wrong number of names should show."""
    parts = denoisers(model)
    components = {} if isinstance(model, nn.Module) else model.components
    return [part for name, part in components.items() if isinstance(part, nn.Module) and name not in parts]


def _before_calls(module: nn.Module, run: Callable[[Any, dict[str, Any]], object]) -> Callable[[], None]:
    """Has `run` called with a module's arguments before each of its calls, outside of what is compiled."""
    compiled = module._compiled_call_impl
    if compiled is None:

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            run(args, kwargs)

        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def call(*args: Any, **kwargs: Any) -> Any:  # compiled in place by module.compile(): its hooks are, too
        run(args, kwargs)
        return compiled(*args, **kwargs)

    module._compiled_call_impl = call
    return lambda: setattr(module, "_compiled_call_impl", compiled)


def _reset(processors: list[CoeffAttnProcessor]) -> None:
    for processor in processors:
        processor.per_sample = None
        processor.per_sample_dropout = []
