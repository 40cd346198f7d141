"""Fixtures: a printed random seed, a tiny model folder, scenes, and the photographs that scikit-image ships."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.exact import keep_dtype

ROOT = Path(__file__).parent.parent


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny model."""
    from sslr1.model.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def any_tiny(request, tiny, tmp_path_factory):
    """Folder of the tiny model of each family."""
    from sslr1.model.tiny import build_tiny

    if request.param == "qwen2_5_vl":
        return tiny
    return build_tiny(tmp_path_factory.mktemp("models") / request.param, family=request.param)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folder of 150 scenes, as JPEG files."""
    from sslr1.data.scenes import write_scenes

    return write_scenes(tmp_path_factory.mktemp("images") / "scenes", 150)


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
    from sslr1.model import parallel

    world = parallel.start("cpu")
    yield world
    parallel.stop()


def launch_anew(*arguments, ranks=1, check=True, timeout=300, **environment):
    """As a user does, `python -m …` or, for several ranks, `torchrun … -m …`; returns the finished process. `tests.forks` has a
    `launch` that costs less."""
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
