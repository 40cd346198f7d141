"""What a GPU machine is spared: kernels compiled before (.kit/kernels.tar.xz) and wheels that it may lack; made by
`prepare`, without a GPU.

The kernels serve the Python and Triton that they were compiled with, and unchanged kernel sources; without them, or
with others, they are compiled there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KIT = ROOT / ".kit"
ARCHIVE = KIT / "kernels.tar.xz"
WHEELS = ("pydantic",)  # what some tests need beside torch, Triton, transformers and pytest
WORK = Path(os.environ.get("SSLR1_GPU_WORK") or Path(tempfile.gettempdir()) / "sslr1-gpu")
MOST = 9_000_000  # bytes that may be carried
NEEDLESS = ("*.ttir", "*.ttgir", "*.llir", "*.ptx", "*.source")  # between source and binary


def environment(rows, dry) -> dict:
    """Of all parts of a run."""
    paths = [str(ROOT / "bench"), str(WORK / "site"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "3"),
        "TRITON_CACHE_DIR": str(WORK / "kernels"),
        "SSLR1_BENCH_MODELS": str(WORK / "models"),
        "SSLR1_BENCH_ROWS": str(rows),
        "SSLR1_BENCH_DRY": "1" if dry else "",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }


def unpack(python):
    """Kernels and wheels, if they were carried and aren't there yet."""
    for folder in ("kernels", "site", "models"):
        (WORK / folder).mkdir(parents=True, exist_ok=True)
    if ARCHIVE.exists() and not kernels():
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(WORK / "kernels", filter="data")
        move(WORK / "kernels")
    wheels = sorted(map(str, KIT.glob("*.whl")))
    if wheels and not any((WORK / "site").iterdir()):
        options = ["--no-index", "--no-deps", "--no-compile", "--target", WORK / "site"]
        subprocess.run([python, "-m", "pip", "install", "-q", *options, *wheels], check=False)


def move(cache):
    """Triton's cache names its files by their place when they were compiled."""
    for group in cache.glob("*/__grp__*.json"):
        files = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in files}}))


def kernels(cache=None) -> int:
    """Compiled kernels in the cache."""
    return len(list((cache or WORK / "kernels").glob("*/*.cubin")))


def is_built() -> bool:
    return (WORK / "built").exists()


def note_build():
    (WORK / "built").touch()


def prepare():
    """Fill .kit/; needs Triton, gcc, pytest and the project installed, for the GPU machine's Python."""
    shutil.rmtree(KIT, ignore_errors=True)
    KIT.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "kernels"
        compile_kernels(cache, stand_in(Path(folder)))
        for pattern in NEEDLESS:
            for path in cache.rglob(pattern):
                path.unlink()
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(cache, arcname=".")
        found = kernels(cache)
    collect_wheels()
    size = sum(path.stat().st_size for path in KIT.iterdir())
    print(f"{KIT}: {found} kernels, {', '.join(sorted(p.name for p in KIT.iterdir()))}: {size / 1e6:.1f} MB")
    if not found or size > MOST:
        sys.exit(f"bench/gpu.py: no kernels, or more than {MOST / 1e6:.0f} MB: don't carry this")


def collect_wheels():
    """For this Python, with what they need in turn."""
    pins = ROOT / "constraints.txt"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:"]
    done = subprocess.run([*pip, "-d", str(KIT), "-c", str(pins), *WHEELS], check=False)
    if done.returncode:
        print(f"no wheels of {', '.join(WHEELS)}: the GPU machine must have them", file=sys.stderr)


def compile_kernels(cache, driver):
    """Every variant that tests marked gpu and benchmarks launch (bench/pretend.py)."""
    from gpu import marked

    env = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_LIBCUDA_PATH": str(driver),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(driver), os.environ.get("LD_LIBRARY_PATH", "")])),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])),
        "PYTHONOPTIMIZE": "1",
        "OMP_NUM_THREADS": "1",
    }
    pytest = "-m pytest -q --assert=plain --tb=line -p pretend -p no:cacheprovider -o timeout=0 -m gpu".split()
    # of the CUDA kernel and of plain PyTorch nothing is to be compiled, and other processes don't pretend
    pytest += ["-k", "not reference and not cuda and not test_ranks"]
    for command in (["bench/pretend.py"], [*pytest, *marked()]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
        told = [x for x in done.stdout.splitlines() if "variants" in x] or [done.stderr[-2000:] or done.stdout[-2000:]]
        print("\n".join(told), flush=True)


def stand_in(folder) -> Path:
    """A folder with a libcuda.so.1 that Triton's launchers link to; every call of it fails."""
    import triton

    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda.h"
    names = set(re.findall(r"CUDAAPI (cu\w+)", header.read_text(errors="replace")))
    names |= {"cuLaunchKernelEx", "cuGetErrorString", "cuOccupancyMaxActiveClusters", "cuTensorMapEncodeTiled"}
    source = folder / "cuda.c"
    source.write_text(
        "".join(f"int {name}(void) {{ return 34; }}\n" for name in sorted(names))
    )  # CUDA_ERROR_STUB_LIBRARY
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source, "-Wl,-soname,libcuda.so.1"], check=True)
    return folder
