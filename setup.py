"""What pyproject.toml cannot say: the compiled kernels for x86 CPUs, the tag of the wheel, and absolute links.

GCC and clang compile the kernels. Where there is neither, pip goes on without, and coeff_diffusers/backends/cpu.py
finds none. ctypes loads them: they use nothing of Python's, so one wheel of a platform serves every Python.
"""

import platform
import re
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

REPOSITORY = "https://github.com/coeff-diffusers/coeff_diffusers"
SOURCE = "coeff_diffusers/backends/csrc/kernel.h"
FLAGS = {"avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "avx2": ["-mavx2", "-mfma"]}


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of the Python that compiles: `_avx2.so`."""
        return f"{fullname.replace('.', '/')}.so"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """For every Python 3, on the platform whose kernels were compiled, or on any if none was."""
        kernels = self.get_finalized_command("build_ext").get_outputs()
        self.root_is_pure = not any(Path(kernel).exists() for kernel in kernels)
        return "py3", "none", super().get_tag()[2]


def with_absolute_links(text: str) -> str:
    """`text`, in Markdown, as it can stand on a page outside the repository."""
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\g<1>{REPOSITORY}/raw/main/", text)
    text = re.sub(r"\]\(#", f"]({REPOSITORY}#", text)
    return re.sub(r"\]\((?!\w+:)", f"]({REPOSITORY}/blob/main/", text)


setup(
    long_description=with_absolute_links(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
    },
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
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
    ],
)
