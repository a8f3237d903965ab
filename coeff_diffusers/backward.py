"""Which choice of adapters a layer had in the forward pass that gradient checkpointing runs again.

It runs in the backward pass, perhaps in a thread of autograd's own, where the call is over and its thread's choice not
known; and nothing of ours is among what checkpointing keeps. The graph tells: the nodes that a forward pass makes have
numbers in a row, and one of its outputs' is the first of them that a backward pass runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .resolved import SWAP, Resolved


class _Kept:
    """What a forward pass went by, kept for as long as its graph is: held by the nodes of its outputs."""

    def __init__(self, key: str, resolved: Resolved, first: int) -> None:
        self.key, self.resolved = key, resolved
        self.first, self.last = first, next_node()
        self.backward: set[int] = set()

    def begin(self, _: Any) -> None:
        self.backward.add(torch._C._current_graph_task_id())


_kept: WeakSet[_Kept] = WeakSet()


def next_node() -> int:
    """The number of the next node of a graph that this thread makes."""
    node = torch.empty(0, requires_grad=True).view(0).grad_fn
    assert node is not None
    return node._sequence_nr() + 1


def keep_for_backward(key: str, resolved: Resolved, first: int, output: Any) -> None:
    """Keeps what a forward pass of the record `key` went by, whose nodes begin with the number `first`."""
    nodes = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    if nodes:
        kept = _Kept(key, resolved, first)
        for node in nodes:
            node.register_prehook(kept.begin)
        with SWAP:
            _kept.add(kept)


def resolved_of_backward(key: str) -> Resolved | None:
    """What the forward pass went by that is run again here; `None` outside of backward passes.

    Raises:
        RuntimeError: if it might be one of several.
    """
    task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
    if task == -1 or node is None:
        return None
    number = node._sequence_nr()
    with SWAP:
        passes = [kept for kept in _kept if kept.key == key and kept.first <= number < kept.last]
    found = {id(kept.resolved): kept.resolved for kept in [k for k in passes if task in k.backward] or passes}
    if len(found) > 1:
        raise RuntimeError(
            "forward passes of several threads with other adapters are in one backward pass, where gradient "
            "checkpointing cannot tell which it runs again: call backward for each"
        )
    return next(iter(found.values()), None)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
