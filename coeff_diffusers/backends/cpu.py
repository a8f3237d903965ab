"""Mixed attention on an x86 CPU by compiled code: csrc/kernel.h, which is built when the package is installed.

Where there was no compiler for it, or the CPU has neither AVX-512 nor AVX2, or the inputs are float64,
[`takes`] says no, and loop.py computes the same with torch's functions, in more time.

Both passes hold the maps of all heads for a block of query rows in memory, each thread those of its own block. With
many keys, of whose gradients each thread would have sums of its own, the threads of the backward pass share a block
instead and divide its keys. All sums have an order that depends on the shapes and the number of threads only, so that
equal inputs give equal bits.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common import alpha_of, empty_output

_LIBRARIES = {"AVX512": "_avx512.so", "AVX2": "_avx2.so"}  # by what torch says of the CPU; files beside this one
_SOURCE = Path(__file__).parent / "csrc" / "kernel.h"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MOST_ROWS = 64  # of a block: keys and values, which each block reads once, no longer take time then
_BLOCK_FLOATS = 2**21 + 2**19  # 10 MB, or a strip, if that is more
_TILE_KEYS = 128
_THREAD_MIN_WORK = 2**21  # multiplications of queries by keys and maps by values, some 40 microseconds


class _Array(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), *((name, ctypes.c_ssize_t) for name in ("b", "h", "t"))]


class _Mask(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), *((name, ctypes.c_ssize_t) for name in ("b", "h", "t", "s", "boolean"))]


class _Call(ctypes.Structure):
    """`Call` of kernel.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("B", "H", "T", "S", "D", "E")),
        *((name, _Array) for name in ("query", "key", "value", "out", "grad_out")),
        *((name, _Array) for name in ("grad_query", "grad_key", "grad_value")),
        ("mask", _Mask),
        *((name, ctypes.c_void_p) for name in ("alpha", "alpha_transposed", "statistics", "grad_alpha", "scratch")),
        *((name, ctypes.c_ssize_t) for name in ("rows", "keys", "threads", "by_rows", "is_causal", "next")),
        ("scale", ctypes.c_double),
    ]


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`forward`] and [`backward`] compute attention of these inputs."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _DTYPES
        and all(size > 0 for size in (*query.shape, key.shape[2], value.shape[3]))
        and instruction_set() is not None
    )


def instruction_set() -> str | None:
    """What the compiled code is for, "AVX512" or "AVX2"; `None` where there is none that this CPU can run.

    torch's environment variable `ATEN_CPU_CAPABILITY` chooses another: `avx2`, or `default` for none.
    """
    return torch.backends.cpu.get_cpu_capability() if _library() is not None else None


def forward(
    query: Tensor, key: Tensor, value: Tensor, coeff: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, laid out as (B, T, H, E), and float32 statistics of the rows for [`backward`], (2, B, H, T).

    Args:
        query, key, value: (B, H, T, D), (B, H, S, D), (B, H, S, E), such as [`takes`] takes.
        coeff: (H, H), or (B, H, H) for one matrix per sample.
        attn_mask: boolean or floating point, with four dimensions, each of size 1 or as of the maps.
    """
    call = _Inputs(query, key, value, alpha_of(coeff, query), attn_mask, is_causal, scale)
    out = empty_output(query, value)
    statistics = query.new_empty(2, *query.shape[:3], dtype=torch.float32)
    wide = _to_write(out)
    call.arrays(out=wide)
    call.c.statistics = statistics.data_ptr()
    call.run("forward")
    return out if out is wide else out.copy_(wide), statistics


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    statistics: Tensor,
    is_causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, laid out as these are, and of alpha; empty where not wanted."""
    call = _Inputs(query, key, value, alpha_of(coeff, query), attn_mask, is_causal, scale)
    gradients = [torch.empty_like(x) if wants else x.new_empty(0) for x, wants in zip((query, key, value), wanted)]
    wide = [_to_write(x) for x in gradients]
    arrays = dict(zip(("grad_query", "grad_key", "grad_value"), wide))
    call.arrays(grad_out=_to_read(grad_out), **{name: x for name, x in arrays.items() if x.numel()})
    call.c.statistics = statistics.data_ptr()
    grad_alpha = call.run("backward", with_alpha=wanted[3])
    for gradient, computed in zip(gradients, wide):
        if gradient is not computed:
            gradient.copy_(computed)
    return (*gradients, grad_alpha)  # type: ignore[return-value]


class _Inputs:
    """A call of the library, with what every call has. Keeps alive the arrays that it points to."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> None:
        self.alive: list[Tensor] = []
        self.c = _Call(scale=scale, is_causal=is_causal)
        self.c.B, self.c.H, self.c.T, self.c.D = query.shape
        self.c.S, self.c.E = value.shape[2:]
        key, value, alpha = (_aligned(x.to(torch.float32).contiguous()) for x in (key, value, alpha))
        self.arrays(query=_to_read(query), key=key, value=value)
        self.c.alpha, self.c.alpha_transposed = (self.pointer(x.contiguous()) for x in (alpha, alpha.mT))
        if attn_mask is not None:
            if attn_mask.dtype != torch.bool:
                attn_mask = _aligned(attn_mask.to(torch.float32))
            strides = (0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride()))
            self.c.mask = _Mask(self.pointer(attn_mask), *strides, attn_mask.dtype == torch.bool)

    def pointer(self, x: Tensor) -> int:
        self.alive.append(x)
        return x.data_ptr()

    def arrays(self, **arrays: Tensor) -> None:
        for name, x in arrays.items():
            setattr(self.c, name, _Array(self.pointer(x), *x.stride()[:3]))

    def run(self, function: str, with_alpha: bool = False) -> Tensor:
        """Calls the library, with scratch of the size it needs. Returns the gradient of alpha, empty if not wanted."""
        c, library = self.c, _library()
        work = c.B * c.H * c.T * c.S * (c.D + c.E)
        c.threads = max(1, min(torch.get_num_threads(), work // _THREAD_MIN_WORK)) if library.has_threads() else 1
        sums = c.threads * c.H * c.S * (c.D + c.E)  # of the gradients of keys and values
        c.by_rows = function == "forward" or sums <= _BLOCK_FLOATS
        strip, tiles = library.rows_of_strip(), -(-c.S // _TILE_KEYS)
        rows = min(_MOST_ROWS, _BLOCK_FLOATS // (c.H * c.S))
        if function == "forward":  # a block for each thread, if possible
            rows = min(rows, -(-c.B * c.T // c.threads))
        elif c.by_rows:
            rows = min(rows, -(-c.T // c.threads), _BLOCK_FLOATS // (c.H * c.S * c.threads))
        else:  # as many tiles for each thread
            tiles = min(-(-tiles // c.threads) * c.threads, c.S)
        c.rows = max(1, rows // strip) * strip
        c.keys = -(-c.S // tiles)
        grad_alpha = torch.zeros(c.threads if with_alpha else 0, c.B, c.H, c.H, dtype=torch.float64, device="cpu")
        c.grad_alpha = grad_alpha.data_ptr() if with_alpha else None
        size = getattr(library, f"{function}_scratch")(ctypes.byref(c))
        scratch = torch.empty(size, dtype=torch.float32, device="cpu")  # whatever torch's default device is
        c.scratch = scratch.data_ptr()
        getattr(library, function)(ctypes.byref(c))
        return grad_alpha.sum(0) if with_alpha else grad_alpha.view(0)


def _is_addressable(x: Tensor) -> bool:
    """Whether the library can read and write `x`: float32, the last dimension without gaps, at a number's address."""
    return x.dtype == torch.float32 and (x.stride(-1) == 1 or x.numel() == 0) and x.data_ptr() % 4 == 0


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of a view of bytes that begins between two numbers."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def _to_read(x: Tensor) -> Tensor:
    """`x`, or a copy of it that the library can read."""
    return x if _is_addressable(x) else _aligned(x.float().contiguous())


def _to_write(x: Tensor) -> Tensor:
    """`x`, or room for what is to be copied into it."""
    if _is_addressable(x):
        return x
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


@functools.cache
def _library() -> Any:
    """The library for this CPU; `None` if there is none or it was not built."""
    return _load(torch.backends.cpu.get_cpu_capability())


def _load(capability: str) -> Any:
    name = _LIBRARIES.get(capability)
    path = Path(__file__).with_name(name) if name else None
    if path is None or not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    for function in ("source", "rows_of_strip", "has_threads", "forward_scratch", "backward_scratch"):
        getattr(library, function).restype = ctypes.c_ssize_t
    if _SOURCE.exists() and library.source() != zlib.crc32(_SOURCE.read_bytes()):  # in a clone: files go by themselves
        raise ImportError(
            f"{path} was built from another kernel.h than the one beside it: install the package once more, or "
            "delete the file, to compute attention by torch's functions"
        )
    return library
