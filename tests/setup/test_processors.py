"""How many processors a process may use: affinity, control groups, ranks, and what the user says."""

import gc
import math
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from sslr1.setup import interrupt, processors


@pytest.fixture
def alone(monkeypatch):
    """No ranks, no quota, eight processors, and nobody has said anything."""
    names = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", *processors.WAITING)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processors, "quota", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def groups(folder, **files):
    """What a system has of control groups: {file: content}, with / as __. Returns the arguments of `quota`."""
    (folder / "cgroup").write_text(files.pop("own"))
    for name, content in files.items():
        path = folder / "fs" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "cgroup", folder / "fs"


@pytest.mark.parametrize(
    "files, processors_granted",
    [
        ({"own": "0::/a/b\n", "a__b__cpu.max": "max 100000\n"}, math.inf),
        ({"own": "0::/a/b\n", "a__b__cpu.max": "150000 100000\n"}, 1.5),
        ({"own": "0::/a/b\n", "a__b__cpu.max": "400000 100000\n", "a__cpu.max": "200000 100000\n"}, 2),
        ({"own": "0::/\n", "cpu.max": "50000 100000\n"}, 0.5),  # a container that sees itself as the root
        ({"own": "0::/elsewhere\n", "cpu.max": "300000 100000\n"}, 3),  # one that doesn't
        ({"own": "0::/a\n"}, math.inf),
        (
            {
                "own": "5:memory:/m\n4:cpu,cpuacct:/a\n",
                "cpu,cpuacct__a__cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct__a__cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        ({"own": "1:cpu:/docker/x\n", "cpu__cpu.cfs_quota_us": "100000\n", "cpu__cpu.cfs_period_us": "50000\n"}, 2),
        ({"own": "1:cpu:/\n0::/\n", "cpu__cpu.cfs_quota_us": "-1\n", "cpu__cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"own": ""}, math.inf),
    ],
)
def test_what_control_groups_grant(tmp_path, files, processors_granted):
    assert processors.quota(*groups(tmp_path, **files)) == processors_granted


def test_a_system_without_control_groups(tmp_path):
    assert processors.quota(tmp_path / "cgroup", tmp_path / "fs") == math.inf
    assert processors.quota() > 0  # this one, whatever it has


def test_affinity_counts_and_not_the_machine(alone, monkeypatch):
    assert processors.threads() == processors.share() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert processors.threads() == 2 and processors.threads(5) == 5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_a_process_bound_to_one_processor():
    """As torch and an own process see it."""
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from sslr1.setup import processors; print(processors.threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "1\n", done.stderr


def test_a_quota_counts_rounded_down(alone, monkeypatch):
    for granted, threads in ((4.0, 4), (2.5, 2), (0.5, 1), (100.0, 8)):
        monkeypatch.setattr(processors, "quota", lambda granted=granted: granted)
        assert processors.threads() == threads


def test_ranks_share(alone, monkeypatch):
    for ranks, threads in ((1, 8), (2, 4), (3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert processors.threads() == threads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(processors, "quota", lambda: 4.0)
    assert processors.threads() == 2


def test_a_rank_that_is_bound_has_its_share_already(alone, monkeypatch):
    """torchrun --numa-binding: four ranks, two on each half of eight processors, or one on each quarter."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for own in (4, 2):
        bound = {0: set(range(own)), os.getppid(): set(range(8))}
        monkeypatch.setattr(os, "sched_getaffinity", bound.__getitem__, raising=False)
        assert processors.share() == 2

    def gone(process):
        if process:
            raise ProcessLookupError
        return {0, 1, 2, 3}

    monkeypatch.setattr(os, "sched_getaffinity", gone, raising=False)
    assert processors.share() == 1


def test_what_the_user_says_holds(alone, monkeypatch):
    for said, threads in (("3", 3), ("12", 12), ("2,1", 2), ("", 8), ("many", 8), ("0", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert processors.threads() == threads and processors.threads(5) == 5


def test_torchruns_one_thread_is_not_the_users(alone, monkeypatch):
    """It sets OMP_NUM_THREADS=1 for several ranks unless it finds another in its environment."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    began_with = {"": 1, "A=1\0": 4, "A=1\0OMP_NUM_THREADS=1\0": 1}  # nothing: it can't be read
    for environment, threads in began_with.items():
        monkeypatch.setattr(processors, "_words", lambda path, environment=environment: environment)
        assert processors.threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processors.threads() == 3


@pytest.mark.parametrize("name", processors.WAITING)
def test_how_threads_wait_is_the_users_where_they_say(alone, monkeypatch, name):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    processors.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "1000" and "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setattr(os, "environ", {name: "active"})
    processors.wait_briefly()
    assert os.environ == {name: "active"}


def test_programs_wait_briefly_and_libraries_as_before(tmp_path):
    """Settled before torch, whose OpenMP reads it once: a module of ours that is started by `-m` shows what torch would
    find."""
    code = "import os, sys; sys.argv = ['-m', 'x']; sys.orig_argv = ['python', '-u', '-m', MODULE, 'x']; import sslr1; "
    code += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in processors.WAITING}
    for module, expected in (("sslr1.train", "1000 False\n"), ("theirs.train", "None False\n")):
        line = [sys.executable, "-c", code.replace("MODULE", repr(module))]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert done.stdout == expected, done.stderr


def test_garbage_is_looked_for_as_usual_when_all_is_built():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        processors.collect_as_usual()
        assert gc.get_freeze_count() == frozen, "a library's process is left alone"
        processors.collect_rarely()
        assert gc.get_threshold()[0] > 100_000
        processors.collect_as_usual()
        assert gc.get_threshold() == before and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


@pytest.mark.parametrize("command", ["preview", "export", "probes"])
def test_commands_that_may_run_long_look_for_garbage_as_usual(command, tmp_path, monkeypatch):
    """Those that build no session, too."""
    asked = {
        "preview": ["preview", str(tmp_path / "no"), "--out", str(tmp_path / "out")],
        "export": ["export", "puzzles", str(tmp_path / "no"), str(tmp_path / "out"), "--format", "trl"],
        "probes": ["evaluate", "--probes", str(tmp_path / "no")],
    }[command]
    called = []
    monkeypatch.setattr(processors, "collect_as_usual", lambda: called.append(command))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(interrupt, "unwind", lambda: None)
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match="2"):
        import_module(f"sslr1.{'evaluate.__main__' if command == 'probes' else command}").main()
    assert called == [command]
