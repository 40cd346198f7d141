"""What all files here compare with: a run that nothing befell."""

import pytest

from tests.faults.runs import command, finish


@pytest.fixture(scope="session")
def unbroken(once, warm, scenes):
    return once("unbroken", lambda folder: finish(command(folder, warm, scenes))) / "run"
