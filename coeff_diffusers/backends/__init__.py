"""The ways to compute mixed attention, and the one place that chooses among them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from . import cpu, loop


def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _way(query, key, value).forward(query, key, value, *args)


def backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _way(query, key, value).backward(grad_out, query, key, value, *args)


def _way(query: Tensor, key: Tensor, value: Tensor) -> ModuleType:
    return cpu if cpu.takes(query, key, value) else loop
