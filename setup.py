"""The extension sslr1._C: C++ always, its CUDA part only where nvcc is. No torch headers, so it builds in seconds."""

import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

NVCC = shutil.which("nvcc") or next(iter(glob("/usr/local/cuda/bin/nvcc")), None)
# Hopper's own instructions, plus portable code that newer GPUs compile for themselves
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


class BuildWithCuda(build_ext):
    def build_extension(self, extension):
        if NVCC:
            extension.extra_objects = [self._compile(source) for source in sorted(glob("csrc/cuda/*.cu"))]
        super().build_extension(extension)

    def _compile(self, source):
        target = Path(self.build_temp) / (Path(source).stem + ".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--threads=0", "-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
        flags += [flag for a in ARCHITECTURES for flag in ("-gencode", a)]
        subprocess.check_call([NVCC, *flags, "-c", source, "-o", str(target)])
        return str(target)


def cuda_library_folder():
    """Where nvcc keeps the static runtime; it is asked, since what is on the path may be a wrapper or a link."""
    dry_run = subprocess.run([NVCC, "-dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = Path(next(line.split("=", 1)[1] for line in dry_run.splitlines() if line.startswith("#$ TOP=")))
    for folder in (top / "lib64", top / "lib", *top.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return str(folder.resolve())
    raise RuntimeError(
        f"{NVCC} is there, but no libcudart_static.a below {top}: install the CUDA runtime's development files"
    )


extension = Pybind11Extension(
    "sslr1._C",
    ["csrc/module.cpp", *(f"csrc/{name}.cpp" for name in ("look", "memory", "points", "render", "row_loss", "views"))],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=[
        "-O3",
        "-ffp-contract=off",
        "-Wno-psabi",
    ],  # no fused multiply-add: pixels equal the reference's
    extra_link_args=["-pthread"],
    define_macros=[("SSLR1_CUDA", "1")] if NVCC else [],
    library_dirs=[cuda_library_folder()] if NVCC else [],
    libraries=["cudart_static", "rt", "dl"] if NVCC else [],
)
ParallelCompile("MAX_JOBS").install()  # files side by side, on all cores unless the variable says how many
setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithCuda})
