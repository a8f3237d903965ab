"""An attention processor that runs the host's own processor and mixes the maps it asks for.

The host's processor is kept and called unchanged, inside a function mode that answers one call,
`torch.nn.functional.scaled_dot_product_attention`, with [`mixed_attention`].
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .call_scale import KEY, CallScale, checked
from .config import CoeffConfig
from .functional import mixed_attention
from .layers import device_of, head_count, select_layers

logger = logging.getLogger(__name__)

# Backends of diffusers' attention dispatcher that come down to scaled_dot_product_attention.
NATIVE_BACKENDS = ("native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn")

# Processors whose later calls are not the layer's own attention: of an image prompt (IP-Adapter, the pictures of video
# models), whose outcome is added, or of perturbed-attention guidance, which stands for no maps at all.
_FIRST_CALL_ALONE = (
    "CosmosAttnProcessor2_5",
    "FluxIPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "PAGCFGJointAttnProcessor2_0",
    "PAGJointAttnProcessor2_0",
    "SD3IPAdapterJointAttnProcessor2_0",
    "WanAnimate2CrossAttnProcessor",
)
# Those that call for the picture first, on layers with projections for it.
_PICTURE_FIRST = ("SkyReelsV2AttnProcessor", "WanAttnProcessor")


class CoeffAttnProcessor(nn.Module):
    """Owns the residual coefficients Delta of one attention layer, (H, H) float32 an adapter, and mixes its maps.

    One instance may serve several layers; their coefficients are then tied:

        pipe.unet.set_attn_processor(CoeffAttnProcessor(8))                          # one matrix for all layers
        pipe.unet.set_attn_processor(CoeffAttnProcessor.for_model(pipe.unet))        # one a layer

    Every call for attention that the wrapped processor makes is mixed: Mochi makes one a sample, Cosmos 3 one for the
    text and one for the picture, Stable Audio 3 two that it subtracts, FLUX.2 one more for reference pictures. Not
    mixed are calls beside the layer's own attention: those of an image prompt, whose outcome is added (IP-Adapters,
    and the pictures of Wan, SkyReels V2 and Cosmos 2.5), and those of perturbed-attention guidance. Coefficients mean
    the same with an image prompt as without.

    The host sees the wrapped processor in its place: its signature, its class (`isinstance` and `__class__`), and the
    attributes that diffusers sets on processors by name.

    Delta takes no part in the host's `state_dict`, so `save_pretrained` writes the base model and nothing else;
    [`save_coeff_weights`] writes Delta. Casting the host (`.to(torch.float16)`) moves Delta but leaves it float32.

    Args:
        num_heads: H, the number of query heads of the layer.
        processor: the processor to run. `None` takes diffusers' `AttnProcessor2_0`, the default of its UNets and of
            PixArt; layers of other models need their own, which [`~CoeffAttnProcessor.for_model`] keeps.
        dropout: probability with which an entry of Delta is dropped while the layer is in training mode.
    """

    def __init__(self, num_heads: int, processor: Any = None, *, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if processor is None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            processor = AttnProcessor2_0()
        if isinstance(processor, CoeffAttnProcessor):
            raise ValueError("processor is a CoeffAttnProcessor already; add_coeff_adapter gives it a further adapter")
        self.num_heads = num_heads
        self.processor = processor
        self.enabled = True
        self.coeff = nn.ParameterDict()
        self.adapter_weights: dict[str, float] = {}
        self.configs: dict[str, CoeffConfig] = {}
        self.call_scale = CallScale()
        self.per_sample: Tensor | None = None  # (samples, H, H) within coeff_per_sample
        self.per_sample_dropout: list[float] = []  # of each of them
        self.add_adapter("default", CoeffConfig(dropout=dropout))
        self._present_signature()

    @classmethod
    def for_model(cls, model: Any, config: CoeffConfig | None = None) -> dict[str, Any]:
        """A processor for every attention layer that `config` selects, in the form `set_attn_processor` takes.

        Layers that are not selected keep the processor they have. Nothing is changed on `model`.

        Raises:
            ValueError: if no layer is selected, or one cannot be served; see [`add_coeff_adapter`].
        """
        config = config or CoeffConfig()
        if not hasattr(model, "attn_processors"):
            raise ValueError(f"{type(model).__name__} has no set_attn_processor; use add_coeff_adapter(model, config)")
        processors = dict(model.attn_processors)
        for path, module in select_layers(model, config).items():
            wrapper = cls(head_count(module), module.processor).to(device_of(module))
            wrapper.configs["default"] = config
            processors[f"{path}.processor"] = wrapper
        return processors

    def add_adapter(self, name: str, config: CoeffConfig) -> None:
        """Adds Delta = 0 under `name`, which must be new, and makes it the only active one."""
        device = next((p.device for p in self.coeff.values()), None)
        zeros = torch.zeros(self.num_heads, self.num_heads, dtype=torch.float32, device=device)
        self.coeff[name] = nn.Parameter(zeros)
        self.configs[name] = config
        self.adapter_weights = {name: 1.0}

    def delete_adapter(self, name: str) -> None:
        """Removes `name`, active or not."""
        del self.coeff[name]
        del self.configs[name]
        self.adapter_weights.pop(name, None)

    def delta(self, training: bool = False) -> Tensor | None:
        """sum_k w_k Delta_k over the active adapters, (H, H) float32; `None` where that is the base model.

        Within [`coeff_per_sample`], (samples, H, H). All is times the call's `coeff_scale`.

        Args:
            training: whether to drop entries, as the adapters' configs say.
        """
        scale = self.call_scale.scale
        if not self.enabled or scale == 0.0:
            return None
        if self.per_sample is not None:
            delta = self._dropped(self.per_sample) if training and any(self.per_sample_dropout) else self.per_sample
            return delta if scale == 1.0 else scale * delta
        active = {name: weight for name, weight in self.adapter_weights.items() if weight != 0.0}
        if not active:
            return None
        terms = [
            scale * weight * F.dropout(self.coeff[name], self.configs[name].dropout, training)
            for name, weight in active.items()
        ]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def _dropped(self, per_sample: Tensor) -> Tensor:
        """(samples, H, H) with entries dropped, in each sample those that one adapter alone would drop now."""
        ones = torch.ones_like(per_sample[0])
        masks = {rate: F.dropout(ones, rate) for rate in dict.fromkeys(self.per_sample_dropout)}
        return per_sample * torch.stack([masks[rate] for rate in self.per_sample_dropout])

    def forward(self, attn: nn.Module, *args: Any, coeff_scale: float | None = None, **kwargs: Any) -> Any:
        """Runs the host's processor, with the maps mixed. The base model runs through the untouched call.

        Args:
            coeff_scale: factor on Delta in this call, from the attention kwargs of a host that passes them on.

        Raises:
            RuntimeError: if the processor ran and no `scaled_dot_product_attention` call was seen: the coefficients
                would have had no effect.
        """
        delta = self.delta(attn.training)  # a processor that was set later has no mode of its own
        if delta is None or coeff_scale == 0.0 or _scores_are_skipped(attn):
            return self.processor(attn, *args, **kwargs)
        self._check_backend()
        if attn.training and torch.is_grad_enabled() and not delta.requires_grad:
            _warn_frozen(tuple(self.adapter_weights))
        name = type(self.processor).__name__
        picture_first = name in _PICTURE_FIRST and getattr(attn, "add_k_proj", None) is not None
        if coeff_scale is not None:
            delta = checked(coeff_scale) * delta
        mode = _MixMaps(delta, name, first=int(picture_first), last=0 if name in _FIRST_CALL_ALONE else None)
        with mode:
            output = self.processor(attn, *args, **kwargs)
        if not mode.mixed:
            raise RuntimeError(
                f"{name} computed its attention without torch.nn.functional.scaled_dot_product_attention, so that the "
                "coefficients had no effect. Use a processor and a backend that do: "
                "model.set_attention_backend('native'), no other attention_backend(...) around the call, or the "
                "model's default processors, set before the coefficients are added; or leave such layers out with "
                "CoeffConfig(exclude=...)."
            )
        return output

    def _check_backend(self) -> None:
        backend = getattr(self.processor, "_attention_backend", None)
        backend = getattr(backend, "value", backend)
        if backend is not None and backend not in NATIVE_BACKENDS:
            raise RuntimeError(
                f"the attention backend {backend!r} hands out no maps to mix; call "
                "model.set_attention_backend('native') while coefficients are in use"
            )
        if getattr(self.processor, "_parallel_config", None) is not None:
            raise RuntimeError(
                "under context parallelism no device has the maps of all heads, so that coefficients cannot mix them; "
                "unload_coeff_weights(model), or do not call enable_parallelism"
            )

    def wrap(self, processor: Any) -> None:
        """Takes `processor` in the place of the wrapped one."""
        self._modules.pop("processor", None)
        self.processor = processor
        self._present_signature()

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        # diffusers asks for the class of a processor to know what it may set on it (an IP-Adapter's scale), what to
        # pass (a mask for FlexAttention), and what to skip
        processor = self.__dict__.get("processor") or self.__dict__.get("_modules", {}).get("processor")
        return type(self) if processor is None else type(processor)

    def __reduce_ex__(self, protocol: Any) -> Any:  # as of any object, with the true class
        return object.__new__, (type(self),), self.__getstate__()

    def _get_name(self) -> str:
        return type(self).__name__

    def _present_signature(self) -> None:
        # The host reads inspect.signature(processor.__call__) and drops the arguments that are not named there, so the
        # signature shown must be the wrapped one's, and coeff_scale. It is read from the instance; the call itself
        # goes by the class.
        def call(self: CoeffAttnProcessor, *args: Any, **kwargs: Any) -> Any:
            return nn.Module.__call__(self, *args, **kwargs)

        signature = inspect.signature(self.processor.__call__)
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        scale = inspect.Parameter(KEY, inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = sorted([itself, *signature.parameters.values(), scale], key=lambda parameter: parameter.kind)
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        self.__dict__["__call__"] = MethodType(call, self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "__call__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._present_signature()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoeffAttnProcessor:
        def moved_not_cast(tensor: Tensor) -> Tensor:
            applied: Tensor = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        self.coeff._apply(moved_not_cast)
        for child in self.children():
            child._apply(fn)
        return self

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """All but the container of Delta, which the host's `named_modules` and `named_parameters` have.

        accelerate's sequential offload goes from child to child, empties those with parameters of their own, and fills
        them from the host's `state_dict` when they are called: the container is not called, and not in there.
        """
        return ((name, child) for name, child in super().named_children() if child is not self.coeff)

    # The wrapped processor's own parameters (an IP-Adapter's) keep the keys they have without the wrapper; Delta has
    # none, for it is no part of the base model.

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        if isinstance(self.processor, nn.Module):
            self.processor.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, unexpected_keys, _ = args
        own = [key for key in state_dict if key.startswith(prefix)]
        if isinstance(self.processor, nn.Module):
            for key in own:
                state_dict[f"{prefix}processor.{key[len(prefix) :]}"] = state_dict.pop(key)
        else:
            unexpected_keys.extend(own)
        for name, delta in self.coeff.items():  # not looked for in the host's file, so not missing from it
            state_dict[f"{prefix}coeff.{name}"] = delta

    # What diffusers reads and sets on processors by name.

    @property
    def _attention_backend(self) -> Any:
        return _of_wrapped(self, "_attention_backend")

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.processor._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return _of_wrapped(self, "_parallel_config")

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.processor._parallel_config = config

    @property
    def scale(self) -> Any:
        return _of_wrapped(self, "scale")

    @scale.setter
    def scale(self, scale: Any) -> None:
        self.processor.scale = scale

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, adapter_weights={self.adapter_weights}, enabled={self.enabled}"


class _MixMaps(TorchFunctionMode):
    """Answers `scaled_dot_product_attention` with [`mixed_attention`], from the `first` call to the `last`."""

    def __init__(self, delta: Tensor, name: str, first: int = 0, last: int | None = None) -> None:
        super().__init__()
        self.delta, self.name, self.first, self.last = delta, name, first, last
        self.calls = 0
        self.mixed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = self.calls
        self.calls += 1
        if call < self.first or (self.last is not None and call > self.last):
            return func(*args, **kwargs)
        self.mixed += 1
        return self._mix(*args, **kwargs)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads = self.delta.shape[-1]
        if query.ndim != 4 or query.shape[1] != heads:
            raise RuntimeError(
                f"{self.name} asks for attention of queries {tuple(query.shape)}, the coefficients are for (batch, "
                f"{heads} heads, tokens, width): leave such layers out with CoeffConfig(exclude=...)"
            )
        delta = self.delta if self.delta.ndim == 2 else _by_query(self.delta, query.shape[0])
        return mixed_attention(query, key, value, delta, *args, **kwargs)


def _scores_are_skipped(attn: nn.Module) -> bool:
    """Whether a hook of diffusers' layer skip takes the maps of this layer for the identity."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())


@lru_cache
def _warn_frozen(names: tuple[str, ...]) -> None:
    logger.warning(
        "a layer trains while its coefficients %s are frozen, as peft's add_adapter leaves what it finds; if they are "
        "meant to train: for p in coeff_parameters(model): p.requires_grad_(True)",
        list(names),
    )


def _by_query(delta: Tensor, batch: int) -> Tensor:
    """A matrix for each query of a layer, which may have folded the frames of a sample into the batch."""
    if len(delta) == 0:
        raise RuntimeError(
            "within coeff_per_sample the model's layers ran, but not by a call of the model that was given to it: "
            "hand over the pipeline, or the object that is called (the compiled one, not the one within)"
        )
    if batch % len(delta):
        raise ValueError(f"a layer's batch of {batch} is no multiple of the model's {len(delta)} samples")
    return delta if batch == len(delta) else delta.repeat_interleave(batch // len(delta), dim=0)


def _of_wrapped(wrapper: CoeffAttnProcessor, name: str) -> Any:
    # an AttributeError here says, as it should, that the wrapped processor has no such setting
    return getattr(wrapper.processor, name)
