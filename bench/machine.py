"""Which machine this is: what every results file begins with."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "nvidia-dali-cuda130", "numpy", "pillow", "simplejpeg")
RESULTS = Path(__file__).parent / "results"


def gpu():
    """The GPU's name, None without one."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}
    return found | ({"gpu": gpu()} if gpu() else {})


def results_file(kind: str, found: dict) -> Path:
    """bench/results/<kind>-<machine>.json; the machine is its GPU where it has one."""
    RESULTS.mkdir(exist_ok=True)
    name = found.get("gpu") or f"{found['cpu']} {found['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{kind} {name}".lower()).strip("-")
    return RESULTS / f"{slug}.json"
