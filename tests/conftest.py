"""Fixtures: a printed random seed, a tiny model folder, scenes, and the photographs that scikit-image ships."""

import fcntl
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.exact import keep_dtype

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--bare", action="store_true", help="skip what needs a package of the project's that isn't installed"
    )


def skip_reason(error, config):
    """Why a test can't run where not all of the project's packages are, None for any other error; only with --bare,
    since what is missing unasked is a fault."""
    missing = config.getoption("--bare") and re.search(r"No module named .?'(pydantic|rich|simplejpeg|nvidia)\b", error)
    return missing and f"needs {missing[1]}, which isn't installed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.failed and (reason := skip_reason(str(report.longrepr), collector.config)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and (reason := skip_reason(str(report.longrepr), item.config)):
        report.outcome, report.longrepr = "skipped", (str(item.path), 1, f"Skipped: {reason}")
    return report


def int_sum(values, start=0):
    values = list(values)
    assert not any(type(value) is float for value in (*values, start)), "sum() of floats: take sslr1.sums.plain_sum"
    return sum(values, start)


@pytest.fixture(autouse=True)
def no_sums_of_floats():
    """`sum` of floats is an error in our own modules: its last bits depend on the Python."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "sslr1" and module.__name__ != "sslr1._C":
            module.sum = int_sum


@pytest.fixture
def seed():
    """A new seed each time, printed when the test fails; SSLR1_TEST_SEED repeats one."""
    value = int(os.environ.get("SSLR1_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SSLR1_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def draw(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def bench(monkeypatch):
    """bench(name): a file of bench/ as a module, its program "__main__" too."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    before = set(sys.modules)

    def load(name):
        if name != "__main__":
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location("bench_main", ROOT / "bench" / "__main__.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if str(ROOT / "bench") in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    if "sslr1.distributed" in sys.modules:
        sys.modules["sslr1.distributed"].stop()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): the folder that make(folder) has filled, for the first of the test processes that asked."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name, make):
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.made").exists():
                make(root / name)
                (root / f"{name}.made").touch()
        return root / name

    return folder


@pytest.fixture(scope="session")
def tiny(once):
    """Folder of the tiny model."""
    from sslr1.model.tiny import build_tiny

    return once("tiny", build_tiny)


@pytest.fixture(scope="session")
def warm(once, tiny, scenes):
    """Folder of the tiny model, able to put an answer into a box: without that every reward is 0, and all runs are
    alike."""
    from tests.forks import launch

    options = [f"model.path={tiny}", f"data.path={scenes}", "data.min_side=112", "train.threads=1"]
    options += ["train.warmup.steps=40", "train.warmup.batch=16"]
    return once("warm", lambda folder: launch("sslr1.warmup", "configs/tiny.yaml", folder, *options))


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def any_tiny(request, tiny, once):
    """Folder of the tiny model of each family."""
    from sslr1.model.tiny import build_tiny

    if request.param == "qwen2_5_vl":
        return tiny
    return once(request.param, lambda folder: build_tiny(folder, family=request.param))


@pytest.fixture(scope="session")
def scenes(once):
    """Folder of 150 scenes, as JPEG files."""
    from sslr1.data.scenes import write_scenes

    return once("scenes", lambda folder: write_scenes(folder, 150))


@pytest.fixture(scope="session")
def emulate(once):
    """emulate(name, source, entry, text): the Emulator of tests.emulation.build, which is built once."""
    from tests import emulation

    if not shutil.which(emulation.COMPILER):
        pytest.skip(f"needs a C++ compiler, and there is no {emulation.COMPILER}")
    machine = once("machine", emulation.build_machine)

    def emulator(name, *what):
        folder = once(f"emulated-{name}", lambda folder: emulation.build(machine, folder, *what))
        return emulation.Emulator(folder / "kernel.so")

    return emulator


@pytest.fixture(scope="session")
def photographs():
    """Real photographs, uint8 [H, W, 3] of several sizes."""
    from skimage import data

    return [
        torch.from_numpy(np.ascontiguousarray(f())) for f in (data.astronaut, data.coffee, data.chelsea, data.rocket)
    ]


@pytest.fixture(scope="session")
def gallery(photographs):
    """More photographs, some grey ones, uint8 [H, W, 3]."""
    from skimage import data

    names = "immunohistochemistry hubble_deep_field camera coins brick grass gravel moon page".split()
    more = [data.retina()[200:1200, 200:1200], data.stereo_motorcycle()[0], *(getattr(data, name)() for name in names)]
    more = [np.stack([image] * 3, -1) if image.ndim == 2 else image for image in more]
    return [
        *photographs,
        *(torch.from_numpy(np.ascontiguousarray(image)) for image in more if min(image.shape[:2]) >= 252),
    ]


@pytest.fixture
def exact_norms(monkeypatch):
    """Float64 comparisons through transformers' modules."""
    keep_dtype(monkeypatch.setattr)


@pytest.fixture
def one_process():
    """A process group of one, for code that reduces over ranks."""
    from sslr1 import distributed

    world = distributed.start("cpu")
    yield world
    distributed.stop()


def launch_anew(*arguments, ranks=1, check=True, timeout=300, **environment):
    """As a user does, `python -m …` or, for several ranks, `torchrun … -m …`; returns the finished process.
    `tests.forks` has a `launch` that costs less."""
    start = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*start, "-m", *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done
