"""What becomes of coefficients where the host puts other processors, or other modules, in the place of its own.

They go along, or it is said: no layer loses its coefficients without a word.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .coefficients import LayerCoefficients
from .layers import softmax_advice, wrapped_processor
from .processor import CoeffAttnProcessor
from .record import GUARD, model_record
from .text import IMPLEMENTATION, SdpaAttention

logger = logging.getLogger(__name__)

# Processors that pipelines set for a call of their own and take off after it: perturbed-attention guidance, and
# TextToVideoZero's. Coefficients go along with them.
_OF_ONE_CALL = ("PAG", "CrossFrameAttnProcessor2_0")


class Guard:
    """Held by a layer with coefficients, and called before each of its forward passes: they must still be there."""

    def __init__(self, layer: nn.Module, coefficients: LayerCoefficients, path: str) -> None:
        self.coefficients, self.path = coefficients, path
        self.handles: list[Any] = []
        self.attach(layer)

    def attach(self, layer: Any) -> None:
        self.remove()
        vars(layer)[GUARD] = self
        self.handles.append(layer.register_forward_pre_hook(self))
        self.handles.append(layer.register_state_dict_pre_hook(self.before_state_dict))

    def __call__(self, layer: Any, args: Any) -> None:
        processor = getattr(layer, "processor", None)
        if not isinstance(processor, CoeffAttnProcessor):
            self._replaced(layer, processor)
        elif isinstance(processor.processor, SdpaAttention) and self.coefficients.takes_part:
            chosen = layer.config._attn_implementation
            if chosen != IMPLEMENTATION:
                raise RuntimeError(
                    f"the attention function was set to {chosen!r}, where coefficients take no part; call "
                    f"set_attn_implementation({IMPLEMENTATION!r}), or unload_coeff_weights(model)"
                )

    def guards(self, processor: CoeffAttnProcessor) -> bool:
        return processor.coefficients is self.coefficients

    def _replaced(self, layer: Any, processor: Any) -> None:
        name = type(processor).__name__
        if name.startswith(_OF_ONE_CALL):
            set_processor(layer, CoeffAttnProcessor.around(processor, self.coefficients))
        elif self.coefficients.takes_part:
            raise RuntimeError(
                f"the processor with this layer's coefficients was replaced by {name}" + self._way_out(layer)
            )

    def _way_out(self, layer: Any) -> str:
        back = "set_coeff_adapters(model, names)"
        advice = softmax_advice(layer)
        if advice is None:
            return f"; {back} puts the coefficients on it, unload_coeff_weights(model) gives them up"
        return (
            f", where no coefficients can take part: {advice}, then {back}, which puts them back, or "
            "unload_coeff_weights(model). If a pipeline sets it in its own call, have the call run without: by "
            f"coeff_disabled(model), or by set_coeff_adapters(model, names, {{{self.path!r}: 0}}) where it is not on "
            "all layers"
        )

    def before_state_dict(self, layer: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Says so if a part of the model is copied, as other models are built from it, without the coefficients."""
        copied = self.coefficients.record.copied
        if f".{prefix}".endswith(f".{self.path}."):
            return  # the model as a whole
        if not copied or self.path in copied:  # the first part of a copy, or of a further one
            copied.clear()
            logger.warning(
                "parts of a model with coefficients are copied, as other models are built of it, and the copy has "
                "none: load_coeff_weights(copy, coeff_state_dict(model)) puts them on a copy (ControlNet and "
                "ControlNet-XS name their layers otherwise: docs/compatibility.md); where the host has put its own "
                "copies into this model, set_coeff_adapters(model, names) does"
            )
        copied.add(self.path)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def put_on(model: nn.Module, path: str, layer: Any, coefficients: LayerCoefficients) -> None:
    """Has the layer at `path` of `model` mix with these coefficients, by its own processor, and guards them."""
    processor = getattr(layer, "processor", None)
    if not isinstance(processor, CoeffAttnProcessor) or processor.coefficients is not coefficients:
        processor = wrapped_processor(layer) or SdpaAttention()
        set_processor(layer, CoeffAttnProcessor.around(processor, coefficients))
    record = model_record(model)
    if GUARD not in vars(layer):
        Guard(layer, coefficients, path)
    record.take(coefficients)
    record.layers = {**record.layers, path: coefficients}  # others may be reading it
    record.paths[path] = coefficients


def take_off(layer: Any) -> None:
    """Gives a layer its own processor back, unless it has another by now."""
    processor = getattr(layer, "processor", None)
    if isinstance(processor, CoeffAttnProcessor):
        set_processor(layer, processor.processor)
        if isinstance(processor.processor, SdpaAttention):
            del layer.processor
    guard = vars(layer).pop(GUARD, None)
    if guard is not None:
        guard.remove()


def set_processor(layer: Any, processor: Any) -> None:
    """`layer.processor = processor`, also from a Module to a plain object and on layers without `set_processor`."""
    layer._modules.pop("processor", None)
    layer.processor = processor
