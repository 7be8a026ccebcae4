"""Build the one extension. Everything declarative is in pyproject.toml."""

import os
import sys
import tempfile
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Contraction would fuse a multiplication and an addition on some instruction sets only, and the
# bits would differ. Each file in csrc/isa/ asks for its instruction set itself, by pragma.
UNIX_FLAGS = ["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno"]
UNIX_FLAGS += os.environ.get("MHA_FAST_CFLAGS", "").split()  # after ours, so that they win
MSVC_FLAGS = ["/O2", "/std:c11", "/fp:precise"]


class BuildExt(build_ext):
    """Add the compiler's flags, and OpenMP where the compiler has it."""

    def build_extensions(self):
        msvc = self.compiler.compiler_type == "msvc"
        flags = MSVC_FLAGS if msvc else UNIX_FLAGS
        openmp = ["/openmp"] if msvc else ["-fopenmp"]
        link = [] if msvc else openmp
        if not self.can_build("#include <omp.h>", openmp, link):
            print("mha_fast: no OpenMP in this compiler, building a serial package")
            openmp, link = [], []
        for extension in self.extensions:
            extension.extra_compile_args = flags + openmp
            extension.extra_link_args = link
        super().build_extensions()

    def can_build(self, include, compile_args, link_args):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(
                f"{include}\nint main(void) {{ return omp_get_num_threads() < 0; }}\n"
            )
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=compile_args
                )
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=link_args
                )
            except Exception as error:  # each compiler class has exceptions of its own
                print(f"mha_fast: OpenMP probe failed: {error}", file=sys.stderr)
                return False
        return True


setup(
    ext_modules=[
        Extension(
            "mha_fast._core",
            ["mha_fast/_core.pyx", *sorted(glob("csrc/*.c") + glob("csrc/isa/*.c"))],
            include_dirs=["csrc", numpy.get_include()],
            depends=glob("csrc/**/*.[hd]*", recursive=True) + glob("mha_fast/*.p[x]*"),
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
