"""The compiled part of the package, `mixed_attention` on x86 CPUs. All else is in pyproject.toml.

GCC and clang compile it. Where there is neither, pip goes on without, and coeff_diffusers/backends/cpu.py finds none.
"""

import platform
import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "coeff_diffusers/backends/csrc/kernel.h"
FLAGS = {"avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "avx2": ["-mavx2", "-mfma"]}

setup(
    ext_modules=[
        Extension(
            f"coeff_diffusers.backends._{name}",
            sources=[f"coeff_diffusers/backends/csrc/{name}.cpp"],
            depends=[SOURCE],
            define_macros=[("SOURCE", f"{zlib.crc32(Path(SOURCE).read_bytes())}LL")],
            extra_compile_args=["-std=c++17", "-O3", *flags],
            optional=True,
        )
        for name, flags in FLAGS.items()
        if platform.machine() == "x86_64"
    ]
)
