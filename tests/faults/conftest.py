"""What all files here compare with: a model that can answer, and a run of it that nothing befell."""

import pytest

from tests.faults.runs import SMALL, command, finish
from tests.forks import launch


@pytest.fixture(scope="session")
def warm(tmp_path_factory, tiny, scenes):
    """The tiny model, able to put an answer into a box: else every reward is 0, and all runs are alike."""
    folder = tmp_path_factory.mktemp("models") / "warm"
    options = [f"model.path={tiny}", f"data.path={scenes}", *SMALL, "train.warmup.steps=40", "train.warmup.batch=16"]
    launch("sslr1.warmup", "configs/tiny.yaml", folder, *options)
    return folder


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, warm, scenes):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(command(folder, warm, scenes))
    return folder / "run"
