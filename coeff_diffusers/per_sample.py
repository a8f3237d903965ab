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

from .adapters import components, denoisers, known_coefficients, layer_coefficients
from .coefficients import LayerCoefficients
from .record import model_record

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
    known_coefficients(model, [name for name in dict.fromkeys(names) if name is not None])
    weights = list(adapter_weights) if isinstance(adapter_weights, Iterable) else [adapter_weights] * len(names)
    if not names or len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(names)} names need as many finite weights, and at least one, got {weights}")
    layers = _denoising_layers(model, names)
    if any(not layer.enabled for layer in layers):
        raise ValueError("coefficients are disabled, so that no name would count: enable_coeff_adapters(model) first")
    if any(layer.per_sample is not None for layer in layers):
        raise ValueError("coeff_per_sample is in use on this model: leave it before entering it with other names")

    pictures = [(name or "", weight) for name, weight in zip(names, weights)]
    with ExitStack() as undo:
        for layer in layers:  # no samples, until the model is called
            layer.per_sample = torch.empty(0, layer.num_heads, layer.num_heads)
        undo.callback(_reset, layers)
        for called, part in _called_objects(model):
            undo.callback(_before_calls(called, _Samples(model, part, pictures)))
        for component in _other_components(model):
            undo.callback(_before_calls(component, lambda args, kwargs: _of_running_call(model, pictures)))
        yield


def _denoising_layers(model: Any, names: Sequence[str | None]) -> list[LayerCoefficients]:
    parts = set(denoisers(model).values())
    for component, part in components(model).items():
        known = [] if part in parts else [name for layer in layer_coefficients(part) for name in layer.coeff]
        elsewhere = sorted({name for name in names if name in known})
        if elsewhere:
            raise ValueError(f"adapters {elsewhere} are on {component}, too, where pictures cannot be told apart")
    return [layer for part in parts for layer in layer_coefficients(part)]


class _Samples:
    """Gives a model's layers, before it is called, a matrix for each sample of the batch."""

    def __init__(self, model: Any, part: nn.Module, pictures: Pictures) -> None:
        self.model, self.part, self.pictures = model, part, pictures
        self.layers = layer_coefficients(part)
        self.current: Any = None

    def __call__(self, args: Any, kwargs: dict[str, Any]) -> None:
        pictures = _of_running_call(self.model, self.pictures)
        batch = _batch_size(args, kwargs)
        if batch % len(pictures):
            raise ValueError(
                f"{type(self.part).__name__} was called with a batch of {batch}, which is no multiple of the "
                f"{len(pictures)} pictures that coeff_per_sample names"
            )
        used = [layer.coeff[name] for layer in self.layers for name, _ in pictures if name in layer.coeff]
        wanted = pictures, batch, [parameter._version for parameter in used]
        if wanted == self.current and not torch.is_grad_enabled():
            return  # the same as in the step before
        model_record(self.part).move(self.part)
        for layer in self.layers:
            times = batch // len(pictures)
            layer.per_sample = _stack(layer, pictures).repeat(times, 1, 1)
            layer.per_sample_dropout = [_dropout(layer, name) for name, _ in pictures] * times
        self.current = wanted


def _stack(layer: LayerCoefficients, pictures: Pictures) -> Tensor:
    """weight * Delta of each picture's adapter, zeros where it has none here: (pictures, H, H)."""
    device = next(iter(layer.coeff.values())).device
    zeros = torch.zeros(layer.num_heads, layer.num_heads, device=device)
    return torch.stack([weight * layer.coeff[name] if name in layer.coeff else zeros for name, weight in pictures])


def _dropout(layer: LayerCoefficients, name: str) -> float:
    return layer.configs[name].dropout if name in layer.configs else 0.0


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


def _reset(layers: list[LayerCoefficients]) -> None:
    for layer in layers:
        layer.per_sample = None
        layer.per_sample_dropout = []
