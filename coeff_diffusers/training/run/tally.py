"""How much memory a computation takes, told on fake tensors: they have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class Tally(TorchDispatchMode):
    """Adds up the tensors that live at the same time, but those of `known` models.

    Attributes:
        now: bytes that live.
        peak: the most that lived at once.
    """

    now: int
    peak: int

    def __init__(self, *known: nn.Module) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: Any = WeakIdKeyDictionary(ref_type=weakref.ref)
        for model in known:
            for tensor in (*model.parameters(), *model.buffers()):
                self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = True
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, size)
        return tensor

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def fake_tensors(*models: nn.Module) -> Iterator[None]:
    """Inside, tensors that are made are fake, and so are the parameters and buffers of `models`, for good."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        replaced: dict[int, Tensor] = {}  # a parameter may be in several places
        for module in (module for model in models for module in model.modules()):
            places: list[Any] = [module._parameters, module._buffers]
            for kept in places:
                for name, value in kept.items():
                    if value is not None:
                        kept[name] = replaced.setdefault(id(value), _fake(value))
        yield


def _fake(value: Tensor) -> Any:
    made = torch.empty_like(value, device="cpu")
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
