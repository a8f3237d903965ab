"""How much memory a computation takes, told on fake tensors: they have shapes and no values.

Integers and booleans are real, since models ask for the values of some: tokens, the lengths of prompts, masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
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


class RealIntegers(TorchDispatchMode):
    """On top of fake tensors: what is computed of real integers and booleans alone is real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(map(_is_real, given)) and not getattr(kwargs.get("dtype"), "is_floating_point", False):
            made = given or tree_leaves(func(*args, **kwargs))
            if all(isinstance(each, Tensor) and _is_countable(each) for each in made):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _places(args[1]))
        return func(*args, **kwargs)


def _is_countable(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_real(tensor: Tensor) -> bool:
    return _is_countable(tensor) and not isinstance(tensor, FakeTensor) and not tensor.is_meta


def _places(indices: Any) -> list[Any]:
    """Indices with the places where a real mask is true in its stead, whose number is told."""
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and _is_real(index):
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


@contextmanager
def fake_tensors(*models: nn.Module) -> Iterator[None]:
    """Inside, tensors that are made are fake but for integers, and so are the weights of `models`, for good."""
    with FakeTensorMode(allow_non_fake_inputs=True), RealIntegers():
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
