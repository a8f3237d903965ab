"""The compiled part of the package, `mixed_attention` on x86 CPUs. All else is in pyproject.toml.

GCC and clang compile it. Where there is neither, pip goes on without, and coeff_diffusers/kernel.py finds nothing.
"""

import platform

from setuptools import Extension, setup

FLAGS = {"avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "avx2": ["-mavx2", "-mfma"]}

setup(
    ext_modules=[
        Extension(
            f"coeff_diffusers._{name}",
            sources=[f"coeff_diffusers/csrc/{name}.cpp"],
            depends=["coeff_diffusers/csrc/kernel.h"],
            extra_compile_args=["-std=c++17", "-O3", *flags],
            optional=True,
        )
        for name, flags in FLAGS.items()
        if platform.machine() in ("x86_64", "AMD64")
    ]
)
