"""An attention processor that runs the host's own processor and mixes the maps it asks for.

The host's processor is kept and called unchanged, inside a function mode that answers one call,
`torch.nn.functional.scaled_dot_product_attention`, with [`mixed_attention`].
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .choice import KEY, SCALE, checked_scale
from .coefficients import LayerCoefficients
from .config import CoeffConfig
from .functional import mixed_attention, mixed_attention_reference
from .layers import head_count, select_layers

# Backends of diffusers' attention dispatcher that come down to scaled_dot_product_attention.
NATIVE_BACKENDS = ("native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn")

# Processors whose later calls are not the layer's own attention: of an image prompt (IP-Adapter, the images of video
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
_UNSTATED = object()  # for None is the base model

# Those that call for the image first, on layers with projections for it.
_IMAGE_FIRST = ("SkyReelsV2AttnProcessor", "WanAttnProcessor")


class CoeffAttnProcessor:
    """Runs the processor of an attention layer, and mixes its maps with the layer's coefficients.

    One instance may serve several layers; their coefficients are then tied:

        pipe.unet.set_attn_processor(CoeffAttnProcessor(8))                          # one matrix for all layers
        pipe.unet.set_attn_processor(CoeffAttnProcessor.for_model(pipe.unet))        # one a layer

    Every call for attention that the wrapped processor makes is mixed: Mochi makes one a sample, Cosmos 3 one for the
    text and one for the image, Stable Audio 3 two that it subtracts, FLUX.2 one more for reference images. Not
    mixed are calls beside the layer's own attention: those of an image prompt, whose outcome is added (IP-Adapters,
    and the images of Wan, SkyReels V2 and Cosmos 2.5), and those of perturbed-attention guidance. Coefficients mean
    the same with an image prompt as without.

    The host sees the wrapped processor in its place: its signature, its class (`isinstance` and `__class__`), and all
    of its attributes, to read and to set. A wrapper is an `nn.Module` exactly where that processor is one.

    Delta, residual and float32, is in `coefficients`, and so no part of the host's module tree: `parameters`,
    `state_dict`, `to` and `save_pretrained` of the host know the base model and nothing else. [`save_coeff_weights`]
    writes it, [`coeff_parameters`] hands it to an optimizer.

    Args:
        num_heads: H, the number of query heads of the layer.
        processor: the processor to run. `None` takes diffusers' `AttnProcessor2_0`, the default of its UNets and of
            PixArt; layers of other models need their own, which [`~CoeffAttnProcessor.for_model`] keeps.
        dropout: probability with which an entry of Delta is dropped while the layer is in training mode.
    """

    processor: Any
    coefficients: LayerCoefficients

    def __new__(cls, num_heads: int, processor: Any = None, **_: Any) -> CoeffAttnProcessor:
        if isinstance(processor, CoeffAttnProcessor):
            raise ValueError("processor is a CoeffAttnProcessor already; add_coeff_adapter gives it a further adapter")
        return _empty_wrapper(processor or _default_processor())

    def __init__(self, num_heads: int, processor: Any = None, *, dropout: float = 0.0) -> None:
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        self.processor = processor or _default_processor()
        self.coefficients = LayerCoefficients(num_heads)
        self.coefficients.add_alone("default", CoeffConfig(dropout=dropout))

    @classmethod
    def around(cls, processor: Any, coefficients: LayerCoefficients) -> CoeffAttnProcessor:
        """A wrapper of `processor` with coefficients that others may have, too."""
        wrapper = _empty_wrapper(processor)
        wrapper.processor, wrapper.coefficients = processor, coefficients
        return wrapper

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
            coefficients = LayerCoefficients(head_count(module))
            coefficients.add_alone("default", config)
            processors[f"{path}.processor"] = cls.around(module.processor, coefficients)
        return processors

    def __call__(
        self, attn: nn.Module, *args: Any, coeff: Any = _UNSTATED, coeff_scale: float | None = None, **kwargs: Any
    ) -> Any:
        """Runs the host's processor, with the maps mixed. The base model runs through the untouched call.

        Args:
            coeff: a choice of adapters in the attention kwargs, which the model's record reads and keeps from here.
            coeff_scale: factor on Delta in this call, from the attention kwargs of a host that passes them on.

        Raises:
            RuntimeError: if the processor ran and no `scaled_dot_product_attention` call was seen: the coefficients
                would have had no effect; or if `coeff` comes this far.
        """
        coefficients = self.coefficients
        if coeff is not _UNSTATED:
            raise RuntimeError(
                f"{KEY}={coeff!r} reached a processor that was set on the model by hand, which does not know the "
                "model's adapters: call set_coeff_adapters(model, names) once before"
            )
        if not coefficients.takes_part or coeff_scale == 0.0 or _scores_are_skipped(attn):
            return self.processor(attn, *args, **kwargs)
        delta = coefficients.delta(attn.training, _device_of(args, kwargs))
        if delta is None:
            return self.processor(attn, *args, **kwargs)
        self._check_backend()
        name = type(self.processor).__name__
        image_first = name in _IMAGE_FIRST and getattr(attn, "add_k_proj", None) is not None
        if coeff_scale is not None:
            delta = checked_scale(coeff_scale) * delta
        mode = _MixMaps(delta, name, first=int(image_first), last=0 if name in _FIRST_CALL_ALONE else None)
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

    # To the host, the wrapped processor. Two attributes are the wrapper's own; those of its coefficients are at hand.

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        # diffusers asks for the class of a processor to know what it may set on it (an IP-Adapter's scale), what to
        # pass (a mask for FlexAttention), and what to skip; torch.compile asks to know what it has to trace
        traced = sys._getframe(1).f_globals.get("__name__", "").startswith("torch._dynamo")
        return type(self) if traced else type(self.__dict__.get("processor", self))

    def __getattr__(self, name: str) -> Any:
        if "processor" not in self.__dict__:  # of an object that is only being made
            raise AttributeError(name)
        return getattr(self.coefficients if hasattr(self.coefficients, name) else self.processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("coefficients", "processor"):
            self.__dict__[name] = value
        else:
            setattr(self.coefficients if hasattr(self.coefficients, name) else self.processor, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.processor, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_wrapper, (self.processor,), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        c = self.coefficients
        return (
            f"CoeffAttnProcessor({self.processor!r}, num_heads={c.num_heads}, adapter_weights={c.adapter_weights}, "
            f"enabled={c.enabled})"
        )


class _ModuleProcessor(CoeffAttnProcessor, nn.Module):
    """Around a processor that is a Module, as an IP-Adapter's is, and one to the host: with that one's parameters,
    children, hooks and mode, under the names that they have without the wrapper."""

    @property
    def forward(self) -> Any:
        return self.processor.forward

    @forward.setter
    def forward(self, forward: Any) -> None:  # as offloading hooks set it
        self.processor.forward = forward


def _default_processor() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def _empty_wrapper(processor: Any) -> CoeffAttnProcessor:
    kind = _ModuleProcessor if isinstance(processor, nn.Module) else CoeffAttnProcessor
    return object.__new__(_wrapper_class(kind, type(processor)))  # type: ignore[arg-type]


@cache
def _wrapper_class(kind: type[CoeffAttnProcessor], processor_class: type) -> type[CoeffAttnProcessor]:
    """A class of wrappers that shows the signature of the processors' own class, `coeff` and `coeff_scale`.

    The host reads `inspect.signature(processor.__call__)` and drops the arguments that are not named there.
    """

    def call(self: CoeffAttnProcessor, *args: Any, **kwargs: Any) -> Any:
        return CoeffAttnProcessor.__call__(self, *args, **kwargs)

    signature = inspect.signature(processor_class.__call__)
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in (KEY, SCALE)]
    parameters = sorted([*signature.parameters.values(), *own], key=lambda parameter: parameter.kind)
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": call})


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
        delta = self.delta if self.delta.ndim == 2 else _by_query(_unperturbed(self.delta, self.name), query.shape[0])
        # ONNX has no operator for the one that mixes a block at a time
        mix = mixed_attention_reference if torch.onnx.is_in_onnx_export() else mixed_attention
        return mix(query, key, value, delta, *args, **kwargs)


def _scores_are_skipped(attn: nn.Module) -> bool:
    """Whether a hook of diffusers' layer skip takes the maps of this layer for the identity."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    """Where a layer computes: the device of the first tensor that it is given."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    return None


def _unperturbed(delta: Tensor, name: str) -> Tensor:
    """The matrices of the samples that perturbed-attention guidance leaves as they are, which come first."""
    if not name.startswith("PAG"):
        return delta
    parts, left = (3, 2) if name.startswith("PAGCFG") else (2, 1)
    return delta[: len(delta) * left // parts]


def _by_query(delta: Tensor, batch: int) -> Tensor:
    """A matrix for each query of a layer, which may have folded the frames of a sample into the batch."""
    if batch % len(delta):
        raise ValueError(f"a layer's batch of {batch} is no multiple of the model's {len(delta)} samples")
    return delta if batch == len(delta) else delta.repeat_interleave(batch // len(delta), dim=0)
