"""The coefficients of a layer: what it adds in a call, and what is dropped in training.

They are no part of the host's module tree, so that what walks it cannot cast, move, offload, freeze or save them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choice import BASE, Choice, entry_of
from .config import CoeffConfig
from .record import ModelRecord
from .resolved import Adapter, Added, Layout, weight_at


class _Slot(threading.local):
    """What the layer adds in the call that this thread runs."""

    def __init__(self) -> None:
        self.added: Added | None = None


class LayerCoefficients:
    """Delta of one layer, or of several that are tied: (H, H) float32 an adapter.

    Parameters move to the device that first asks for them. Once they have been part of a graph they stay where they
    are, for their optimizer's state is there, too; layers on other devices, to which they may be tied, get a copy at
    each call.

    Args:
        num_heads: H, the number of query heads.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.number = 0  # among those of its record, which is its model's once that has chosen adapters
        self.record = ModelRecord()
        self.record.numbered = (self,)
        self.layer_enabled = True
        self.stays = False
        self.slot = _Slot()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "slot"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.slot = _Slot()

    def add_alone(self, name: str, config: CoeffConfig) -> None:
        """Adds Delta = 0 under `name` to coefficients that belong to no model yet, as the active adapter."""
        with torch.inference_mode(False):  # or else it could never be trained, nor changed outside of that mode
            zeros = nn.Parameter(torch.zeros(self.num_heads, self.num_heads))
        adapter = Adapter(config, Layout({self.number: self.num_heads}), coeff={self.number: zeros})
        state = self.record.having({**self.record.state.adapters, name: adapter}, Choice((((name, 1.0),),)))
        self.record.state = state

    @property
    def coeff(self) -> Mapping[str, nn.Parameter]:
        """Delta by the name of the adapter, as the parameter that it is, or becomes when it is asked for here."""
        return _Coeff(self)

    @property
    def configs(self) -> dict[str, CoeffConfig]:
        return {name: adapter.config for name, adapter in self.adapters().items()}

    def adapters(self) -> dict[str, Adapter]:
        """Those that the layer has."""
        return {name: adapter for name, adapter in self.record.state.adapters.items() if self.has(name)}

    def has(self, name: object) -> bool:
        adapter = self.record.state.adapters.get(name)  # type: ignore[call-overload]
        return adapter is not None and self.number in adapter.layout.sides

    @property
    def adapter_weights(self) -> dict[str, float]:
        """The active adapters here, and their weights."""
        entry, state = entry_of(self.record), self.record.state
        choice = state.default if entry is None or entry.choice is BASE else entry.choice
        mixture = () if choice.per_image else choice.mixtures[0]
        return {name: weight_at(weight, self.number) for name, weight in mixture if self.has(name)}

    @property
    def enabled(self) -> bool:
        return self.layer_enabled and self.record.state.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.layer_enabled = enabled

    @property
    def takes_part(self) -> bool:
        """Whether the layer mixes now."""
        return self.layer_enabled and self.record.added(self) is not None

    def delta(self, training: bool = False, device: torch.device | None = None) -> Tensor | None:
        """sum_k w_k Delta_k over the adapters of the call, (H, H) float32; `None` where that is the base model.

        (samples, H, H) where each sample has its own.

        Args:
            training: whether to drop entries, as the adapters' configs say.
            device: where it is needed. `None` is where it is.
        """
        added = self.record.added(self) if self.layer_enabled else None
        if added is None:
            return None
        if added.matrix is None:
            terms = [w * F.dropout(self._on(delta, device), rate, training) for delta, w, rate in added.terms]
            return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
        matrix = added.matrix if device is None else added.matrix.to(device)
        return _dropped(matrix, added.dropout) if training and any(added.dropout) else matrix

    def on(self, name: str, device: torch.device | None) -> Tensor:
        """Delta of one adapter, on `device`: the parameter itself, or a copy that hands gradients on to it."""
        return self._on(self.coeff[name], device)

    def _on(self, delta: Tensor, device: torch.device | None) -> Tensor:
        if torch.jit.is_tracing():
            return delta.data  # a constant of the trace, which must not require a gradient
        tracing = torch.compiler.is_compiling()
        if device is not None and delta.device != device:
            if self.stays or tracing or not delta.requires_grad:
                return delta.to(device)
            self.move(device)
        if not tracing and torch.is_grad_enabled():
            self.stays = True
        return delta

    def move(self, device: torch.device) -> None:
        """Moves Delta of all adapters that train, as the parameters they are, unless it stays where it is."""
        if not self.stays:
            with torch.inference_mode(False):
                for adapter in self.adapters().values():
                    if adapter.coeff is not None:
                        parameter = adapter.coeff[self.number]
                        parameter.data = parameter.data.to(device)


class _Coeff(Mapping[str, nn.Parameter]):
    """Name -> parameter of a layer. An adapter gets parameters when one of them is asked for."""

    def __init__(self, layer: LayerCoefficients) -> None:
        self.layer = layer

    def __getitem__(self, name: str) -> nn.Parameter:
        if not self.layer.has(name):
            raise KeyError(name)
        adapter = self.layer.record.make_parameters(name)
        assert adapter.coeff is not None
        return adapter.coeff[self.layer.number]

    def __contains__(self, name: object) -> bool:
        return self.layer.has(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.adapters())

    def __len__(self) -> int:
        return len(self.layer.adapters())


def _dropped(matrix: Tensor, rates: tuple[float, ...]) -> Tensor:
    """(samples, H, H) with entries dropped, in each sample those that one adapter alone would drop now."""
    ones = torch.ones_like(matrix[0])
    masks = {rate: F.dropout(ones, rate) for rate in dict.fromkeys(rates)}
    return matrix * torch.stack([masks[rate] for rate in rates])
