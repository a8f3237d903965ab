"""Coefficients on a model of ComfyUI: what fits, what does not and why, and a clone of the model that has them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from coeff_diffusers.coeff_file import too_large, value_problem

from .layers import flux_layers, replaced_by_others, unet_layers
from .mixing import MixedForward

logger = logging.getLogger(__name__)

KEY = "coeff_diffusers"
SUFFIX = ".coeff"
# Class of ComfyUI's model -> component and class in diffusers, its layers, and the attribute with their heads
FAMILIES: dict[str, tuple[str, str, Callable[..., dict[str, str]], str]] = {
    "UNetModel": ("unet", "UNet2DConditionModel", unet_layers, "heads"),
    "Flux": ("transformer", "FluxTransformer2DModel", flux_layers, "num_heads"),
}


def apply_coefficients(
    model: Any, tensors: Mapping[str, Tensor], header: Mapping[str, Any], strength: float, strict: bool = True
) -> Any:
    """A clone of the model, with these coefficients beside those that it may have already.

    Args:
        model: a `ModelPatcher`.
        tensors: of a coefficient file, key -> Delta, (H, H).
        header: of the file.
        strength: factor on Delta; 0 changes nothing, bit for bit.
        strict: whether anything that does not fit is an error. Otherwise it is left out, and logged.

    Raises:
        ValueError: with every mismatch, if something does not fit, or with `strict=False` if nothing does.
    """
    fitting, problems = fit(model, tensors, header["coeff_diffusers"])
    listed = "\n".join(f"  {what}: {why}" for what, why in problems.items())
    name = type(model.get_model_object("diffusion_model")).__name__
    if problems and (strict or not fitting):
        raise ValueError(f"the coefficients do not fit ComfyUI's {name}:\n{listed}")
    if problems:
        logger.warning("these coefficients do not fit ComfyUI's %s, and are left out:\n%s", name, listed)
    clone = model.clone()
    if strength == 0.0:
        return clone
    for module, delta in fitting.items():
        path = f"diffusion_model.{module}.forward"
        before = clone.get_model_object(path)
        forward, mixture = (before.forward, before.mixture) if isinstance(before, MixedForward) else (before, ())
        clone.add_object_patch(path, MixedForward(forward, (*mixture, (delta.float(), float(strength)))))
    clone.remove_wrappers_with_key("diffusion_model", KEY)
    clone.add_wrapper_with_key("diffusion_model", KEY, _CheckFirstCall(clone.object_patches))
    return clone


def fit(
    model: Any, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """ComfyUI's module -> Delta, of what fits; and key of the file, or part of the model -> why it does not."""
    diffusion = model.get_model_object("diffusion_model")
    family = next((FAMILIES[c.__name__] for c in type(diffusion).__mro__ if c.__name__ in FAMILIES), None)
    if family is None:
        return {}, {"model": f"is a {type(diffusion).__name__}; coefficients can be had on {', '.join(FAMILIES)}"}
    component, diffusers_class, find_layers, heads_name = family
    layers = find_layers(name for name, _ in diffusion.named_modules())
    heads = {path: getattr(diffusion.get_submodule(module), heads_name) for path, module in layers.items()}
    problems = _base_problems(description["base"], component, diffusers_class, heads)
    replaced = model.model_options.get("transformer_options", {}).get("patches_replace", {})
    fitting = {}
    for key, delta in tensors.items():
        path = key.removeprefix(f"{component}.").removesuffix(SUFFIX)
        if key != f"{component}.{path}{SUFFIX}":
            problems[key] = f"is of another component than {component}, which is all that this node changes"
        elif path not in layers:
            problems[key] = "there is no such attention layer"
        elif problem := _value_problem(delta, heads[path]) or _module_problem(diffusion, layers[path], replaced):
            problems[key] = problem
        else:
            fitting[layers[path]] = delta
    return fitting, problems


def _base_problems(
    base: Mapping[str, Any], component: str, diffusers_class: str, heads: Mapping[str, int]
) -> dict[str, str]:
    """What the file says of its base model and is otherwise here."""
    said = base.get(component)
    if said is None:
        return {"file": f"it is for {sorted(base)}, and this model is a {component}"}
    if said["class"] != diffusers_class:
        return {component: f"the file is for a {said['class']}, this is the {diffusers_class} of diffusers"}
    found = {}
    for path in sorted(said["heads"].keys() | heads.keys()):
        there, here = said["heads"].get(path, "no"), heads.get(path, "no")
        if there != here:
            found[f"{component}.{path}"] = f"{there} heads in the file's model, {here} here"
    return found


def _value_problem(delta: Tensor, heads: int) -> str | None:
    if delta.shape != (heads, heads):
        return f"must have shape {(heads, heads)} for {heads} heads, got {tuple(delta.shape)}"
    return value_problem(delta) or too_large(delta)


def _module_problem(diffusion: nn.Module, name: str, replaced: dict[str, dict[tuple, object]]) -> str | None:
    """Why the override would not be asked in this layer."""
    kind = type(diffusion.get_submodule(name))
    if "transformer_options" not in inspect.signature(kind.forward).parameters:
        return f"{kind.__name__} of this ComfyUI takes no transformer_options: update ComfyUI"
    if replaced_by_others(name, replaced):
        return f"another node computes {name} (an IP-Adapter, say), where no coefficients can take part"
    return None


class _CheckFirstCall:
    """Notices layers whose attention was computed without their coefficients, as by a node that was added later."""

    def __init__(self, patches: Mapping[str, Any]) -> None:
        self.mixed = {path: patch for path, patch in patches.items() if isinstance(patch, MixedForward)}
        self.checked = False

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = executor(*args, **kwargs)
        unused = [path for path, forward in self.mixed.items() if not forward.calls]
        if unused and not self.checked:
            raise RuntimeError(
                f"the coefficients of {len(unused)} of {len(self.mixed)} layers had no effect, the first is "
                f"{unused[0]!r}: another node computes these layers itself; leave it out"
            )
        self.checked = True
        return out
