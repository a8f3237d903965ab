"""The coefficients of a layer: Delta of each adapter, which of them count, and what is dropped in training.

They are no part of the host's module tree, so that what walks it cannot cast, move, offload, freeze or save them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CoeffConfig
from .record import ModelRecord


class LayerCoefficients:
    """Delta of one layer, or of several that are tied: (H, H) float32 an adapter.

    Delta moves to the device that first asks for it. Once it has been part of a graph it stays where it is, for its
    optimizer's state is there, too; layers on other devices, to which it may be tied, get a copy at each call.

    Args:
        num_heads: H, the number of query heads.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.enabled = True
        self.coeff: dict[str, nn.Parameter] = {}
        self.adapter_weights: dict[str, float] = {}
        self.configs: dict[str, CoeffConfig] = {}
        self.record = ModelRecord()  # of the model, once it has chosen adapters
        self.per_sample: Tensor | None = None  # (samples, H, H) within coeff_per_sample
        self.per_sample_dropout: list[float] = []  # of each of them
        self.stays = False

    def add_adapter(self, name: str, config: CoeffConfig) -> None:
        """Adds Delta = 0 under `name`, which must be new, and makes it the only active one."""
        device = next((p.device for p in self.coeff.values()), None)
        with torch.inference_mode(False):  # or else it could never be trained, nor changed outside of that mode
            zeros = torch.zeros(self.num_heads, self.num_heads, dtype=torch.float32, device=device)
            self.coeff[name] = nn.Parameter(zeros)
        self.configs[name] = config
        self.adapter_weights = {name: 1.0}

    def delete_adapter(self, name: str) -> None:
        """Removes `name`, active or not."""
        del self.coeff[name]
        del self.configs[name]
        self.adapter_weights.pop(name, None)

    @property
    def takes_part(self) -> bool:
        """Whether the next forward pass mixes, whatever its own weight is."""
        return self.enabled and (self.per_sample is not None or any(self.adapter_weights.values()))

    def delta(self, training: bool = False, device: torch.device | None = None) -> Tensor | None:
        """sum_k w_k Delta_k over the active adapters, (H, H) float32; `None` where that is the base model.

        Within [`coeff_per_sample`], (samples, H, H). All is times the call's `coeff_scale`.

        Args:
            training: whether to drop entries, as the adapters' configs say.
            device: where it is needed. `None` is where it is.
        """
        scale = self.record.scale
        if not self.takes_part or scale == 0.0:
            return None
        if self.per_sample is not None:
            if device is not None and device != self.per_sample.device and not torch.compiler.is_compiling():
                self.move(device)  # for the next call
                self.per_sample = self.per_sample.to(device)
            delta = self._dropped(self.per_sample) if training and any(self.per_sample_dropout) else self.per_sample
            return delta if scale == 1.0 else scale * delta
        terms = [
            scale * weight * F.dropout(self.on(name, device), self.configs[name].dropout, training)
            for name, weight in self.adapter_weights.items()
            if weight != 0.0
        ]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def on(self, name: str, device: torch.device | None) -> Tensor:
        """Delta of one adapter, on `device`: the parameter itself, or a copy that hands gradients on to it."""
        parameter = self.coeff[name]
        if torch.jit.is_tracing():
            return parameter.data  # a constant of the trace, which must not require a gradient
        tracing = torch.compiler.is_compiling()
        if device is not None and parameter.device != device:
            if self.stays or tracing:
                return parameter.to(device)
            self.move(device)
        if not tracing and torch.is_grad_enabled():
            self.stays = True
        return parameter

    def move(self, device: torch.device) -> None:
        """Moves Delta of all adapters, as the parameters they are, unless it stays where it is."""
        if not self.stays:
            with torch.inference_mode(False):
                for parameter in self.coeff.values():
                    parameter.data = parameter.data.to(device)

    def _dropped(self, per_sample: Tensor) -> Tensor:
        """(samples, H, H) with entries dropped, in each sample those that one adapter alone would drop now."""
        ones = torch.ones_like(per_sample[0])
        masks = {rate: F.dropout(ones, rate) for rate in dict.fromkeys(self.per_sample_dropout)}
        return per_sample * torch.stack([masks[rate] for rate in self.per_sample_dropout])
