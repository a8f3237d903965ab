"""The ways to compute mixed attention, and the one place that chooses among them.

| name | where | what computes |
|---|---|---|
| cpu | x86 CPUs; float32, bfloat16, float16 | compiled C++, cpu.py and csrc |
| triton | GPUs: Nvidia from the RTX 30 on, AMD; bfloat16, float16 | Triton kernels, gpu.py and triton_kernels.py |
| torch | everywhere, everything | torch's functions in a loop over blocks, loop.py |
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, gpu, loop

_VARIABLE = "COEFF_DIFFUSERS_BACKEND"
_WAYS = {"cpu": cpu, "triton": gpu, "torch": loop}


def set_mixing_backend(name: str = "auto") -> None:
    """Chooses what computes [`mixed_attention`], in this process.

    Args:
        name: "auto" takes the fastest for each input: "cpu", the compiled kernel, for an x86 CPU; "triton", the Triton
            kernels, for bfloat16 and float16 on a GPU; else "torch". One of these three keeps to that way, and takes
            "torch" for the inputs that it does not serve. The environment variable `COEFF_DIFFUSERS_BACKEND` says the
            same when a process starts.

    Not between a forward pass and its backward pass: the gradients would not be finite.

    Raises:
        ValueError: if there is no such way, or it cannot be used on this machine.
    """
    global _chosen
    _chosen = _checked(name, "set_mixing_backend")


def get_mixing_backend(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, heads: int = 8, width: int = 64
) -> str:
    """What computes [`mixed_attention`] of inputs on `device`: "cpu", "triton" or "torch".

    Args:
        dtype: of queries, keys and values.
        heads: H, their number of heads.
        width: D, the width of a head.
    """
    example = torch.empty(1, heads, 1, width, device=device, dtype=dtype)
    way = _way(example, example, example)
    return next(name for name, module in _WAYS.items() if module is way)


def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The output, and statistics of the rows for [`backward`]: (2, B, H, T) float32, of what the way in use needs."""
    out, statistics = _run("forward", query, key, value, query, key, value, *args)
    return out, statistics


def backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, and of alpha for each sample; empty where not wanted."""
    return tuple(_run("backward", query, key, value, grad_out, query, key, value, *args))


def _way(query: Tensor, key: Tensor, value: Tensor) -> ModuleType:
    if _chosen in ("auto", "cpu") and cpu.takes(query, key, value):
        return cpu
    if _chosen in ("auto", "triton") and gpu.takes(query, key, value):
        return gpu
    return loop


def _run(function: str, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
    way = _way(query, key, value)
    if way is gpu:  # a compiler's failure is met at a kernel's first launch
        try:
            return getattr(gpu, function)(*args)
        except Exception as error:
            if gpu.is_passing(error, query.device):
                raise
            gpu.give_up(query, value, error)
            way = loop
    return getattr(way, function)(*args)


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *_WAYS):
        raise ValueError(f"{source}: there is no backend {name!r}; there are 'auto', 'cpu', 'triton' and 'torch'")
    if name == "cpu" and cpu.instruction_set() is None:
        raise ValueError(
            f"{source}: no compiled kernel for this CPU is installed (it needs x86-64 with AVX2, and GCC or clang "
            "when the package is installed); 'auto' or 'torch' work without"
        )
    if name == "triton" and not gpu.is_installed():
        raise ValueError(
            f"{source}: triton is not installed; it comes with torch's CUDA and ROCm wheels for Linux, and as "
            "triton-windows for Windows; 'auto' or 'torch' work without"
        )
    return name


_chosen = _checked(os.environ.get(_VARIABLE, "auto"), _VARIABLE)
