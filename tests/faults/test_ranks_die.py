"""One rank of two is killed: the others don't wait for it, and torchrun goes on from the last checkpoint if it may."""

import os
import signal
import time

import pytest
import torch

from sslr1 import distributed
from tests.faults.runs import check_whole, command, finish, lines, records, same, start, wait_for


@pytest.fixture(scope="module")
def pair(tmp_path_factory, warm, scenes):
    """A run on two ranks that nothing befell."""
    folder = tmp_path_factory.mktemp("pair")
    finish(command(folder, warm, scenes, ranks=2))
    return folder / "run"


def ranks(torchrun):
    """Process ids of the ranks by number."""
    with open(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children") as file:
        children = file.read().split()
    found = {}
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            variables = dict(v.split("=", 1) for v in file.read().split("\0") if "=" in v)
        if "LOCAL_RANK" in variables:
            found[int(variables["RANK"])] = int(child)
    return found


def start_and_kill_one(line, run, draw):
    process = start(line)
    wanted = 2 + int(draw.integers(0, 3))
    wait_for(lambda: lines(run / "metrics.jsonl") >= wanted, process)
    os.kill(ranks(process)[int(draw.integers(0, 2))], signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=240)
    return process.returncode, time.monotonic() - began, out, err


@pytest.mark.slow
def test_the_run_ends_within_a_minute_and_can_be_started_again(tmp_path, pair, warm, scenes, draw):
    line, run = command(tmp_path, warm, scenes, ranks=2), tmp_path / "run"
    code, took, _, err = start_and_kill_one(line, run, draw)
    assert code not in (0, None) and took < 60, err
    check_whole(run)
    assert "going on from" in finish(line)[0]
    assert same(run, pair)


@pytest.mark.slow
def test_ranks_do_not_outlive_torchrun(tmp_path, pair, warm, scenes):
    """torchrun is killed, its ranks aren't: they save and leave, and nobody holds the folder when it is started
    again."""
    line, run = command(tmp_path, warm, scenes, "train.steps=100000", "eval.every=3", ranks=2), tmp_path / "run"
    process = start(line)
    wait_for(lambda: lines(run / "metrics.jsonl") >= 2, process)
    own = ranks(process)
    assert set(own) == {0, 1}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in own.values()), seconds=60)
    finally:
        for pid in own.values():
            if os.path.exists(f"/proc/{pid}"):
                os.kill(pid, signal.SIGKILL)
    saved = int(check_whole(run)[-1].name[5:])
    assert saved == int(records(run)[-1]["step"])
    finish([*line, f"train.steps={max(saved + 1, 3)}"])  # the last step is evaluated, which the pair's second isn't
    assert records(run)[1:3] == records(pair)[1:3]


def test_a_start_does_not_see_what_the_one_before_wrote(monkeypatch):
    """torchrun keeps the store in which ranks publish where they listen; whoever read a dead rank's address would wait
    for good."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": server.port, "GROUP_WORLD_SIZE": 1}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    stores = []
    for count in "001":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        stores.append(distributed._store(1))
    stores[0].set("address", "here")
    assert stores[1].check(["address"]) and not stores[2].check(["address"])


@pytest.mark.slow
def test_torchrun_starts_it_again(tmp_path, pair, warm, scenes, draw):
    line, run = command(tmp_path, warm, scenes, ranks=2, torchrun=["--max-restarts=1"]), tmp_path / "run"
    code, _, out, err = start_and_kill_one(line, run, draw)
    assert code == 0 and "going on from" in out, err
    assert same(run, pair)
