"""Compiles the launches of backends/gpu.py for GPUs that are not there, and reads off what they take.

The inputs lie on torch's `meta` device, and a recorder stands in each kernel's place: what is compiled is what gpu.py
would launch, with the specialisations that Triton's launcher would make.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coeff_diffusers.backends import gpu, triton_kernels

# bytes of shared memory that a program may have, and multiprocessors of a card
TARGETS = {
    "sm_80": (166912, 108),
    "sm_86": (101376, 84),
    "sm_89": (101376, 128),
    "sm_90": (232448, 132),
    "sm_100": (232448, 148),
    "sm_120": (101376, 170),
    "gfx942": (65536, 304),
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Resources(NamedTuple):
    """Of a compiled kernel: registers of a thread, bytes that it spills, bytes of shared memory of a program.

    And loads of two bytes at a time from global memory, in the code for Nvidia's.
    """

    registers: int
    spilled: int
    shared: int
    narrow_loads: int


def launches(
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
) -> list[Launch]:
    """The first launch of each kernel, forward and backward, for attention of (B, H, T, S, D)."""
    found: dict[str, Launch] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)
            self.arg_names = self.kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: found.setdefault(self.name, Launch(self.name, self.kernel, grid, arguments))

    B, H, T, S, D = shape
    query, key, value, grad_out = (
        torch.empty(B, n, H, D, dtype=dtype, device="meta").transpose(1, 2) for n in (T, S, S, T)
    )
    coeff = torch.empty(H, H, device="meta")
    with monkeypatch.context() as patch:
        for name in [name for name in dir(triton_kernels) if name.endswith("_kernel")]:
            patch.setattr(triton_kernels, name, Recorder(name))
        patch.setattr(gpu, "architecture", lambda device: architecture)
        patch.setattr(gpu, "multiprocessors", lambda device: TARGETS[architecture][1])
        _, statistics = gpu.forward(query, key, value, coeff, mask, False, D**-0.5)
        gpu.backward(grad_out, query, key, value, coeff, mask, statistics, False, D**-0.5, [True] * 4)
    return list(found.values())


def compiled(launch: Launch, architecture: str) -> Resources:
    kernel, arguments = launch.kernel, dict(launch.arguments)
    options = {"num_warps": arguments.pop("num_warps")}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    constants: dict[str, Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    is_amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", int(architecture[3:]), 32)
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    if is_amd:
        text = binary.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
            file.write(binary.asm["cubin"])
        usage = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        os.unlink(file.name)
        registers, spilled = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    narrow_loads = len(re.findall(r"ld\.global\S*\.b16 ", binary.asm.get("ptx", "")))
    return Resources(registers, spilled, binary.metadata.shared, narrow_loads)
