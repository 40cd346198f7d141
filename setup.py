"""The extension sslr1._C: C++ always, its CUDA part only where nvcc and the static runtime are. No torch headers, so it
builds in seconds. Without that part the loss says so when it first meets a GPU, since pip shows nothing of what is
printed here."""

import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from runpy import run_path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

NVCC = shutil.which("nvcc") or next(iter(glob("/usr/local/cuda/bin/nvcc")), None)
# Hopper's own instructions, plus portable code that newer GPUs compile for themselves
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
PROCESSORS = run_path("sslr1/setup/processors.py")["share"]()  # sslr1 itself need not be importable yet


class BuildWithCuda(build_ext):
    def build_extension(self, extension):
        if CUDA:
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
    """Where nvcc keeps the static runtime, or None; it is asked, since what is on the path may be a wrapper or a
    link."""
    dry_run = subprocess.run([NVCC, "-dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = Path(next(line.split("=", 1)[1] for line in dry_run.splitlines() if line.startswith("#$ TOP=")))
    for folder in (top / "lib64", top / "lib", *top.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return str(folder.resolve())
    print(
        f"sslr1 is built WITHOUT its CUDA part: {NVCC} is there, but no libcudart_static.a below {top}; install the "
        "CUDA runtime's development files and build again",
        file=sys.stderr,
    )


SOURCES = (
    "attention",
    "causal_conv",
    "delta_rule",
    "delta_step",
    "draw",
    "elementwise",
    "look",
    "memory",
    "points",
    "render",
    "row_loss",
    "step",
)
CUDA = cuda_library_folder() if NVCC else None
extension = Pybind11Extension(
    "sslr1._C",
    ["csrc/module.cpp", *(f"csrc/{name}.cpp" for name in SOURCES)],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=[
        "-O3",
        "-ffp-contract=off",
        "-Wno-psabi",
    ],  # no fused multiply-add: pixels equal the reference's
    extra_link_args=["-pthread"],
    define_macros=[("SSLR1_CUDA", "1")] if CUDA else [],
    library_dirs=[CUDA] if CUDA else [],
    libraries=["cudart_static", "rt", "dl"] if CUDA else [],
)
ParallelCompile("MAX_JOBS", default=PROCESSORS).install()  # files side by side, so many unless the variable says
packages = [*find_packages(include=("sslr1", "sslr1.*")), "sslr1.kernels"]
setup(packages=packages, ext_modules=[extension], cmdclass={"build_ext": BuildWithCuda})
