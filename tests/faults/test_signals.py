"""SIGTERM and SIGUSR1: finish the step, checkpoint, exit 0; Ctrl-C: the same, and the end that a shell expects of it.
tests/test_train.py has the plain case of SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sslr1.setup import interrupt
from tests.conftest import ROOT
from tests.faults.runs import LAUNCHERS, check_whole, command, finish, lines, records, start, wait_for
from tests.forks import Program

LONG = ("train.steps=10000", "checkpoint.every=10000", "eval.every=10000", "train.warmup.steps=0")


def stop(line, when, number=signal.SIGTERM):
    """Start, send the signal when the time has come; returns (exit code, seconds it took to leave, stdout, stderr)."""
    process = start(line)
    wait_for(when, process)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - began, out, err


def test_signals_are_noted_and_handlers_put_back_where_none_came():
    """After one that came the run saves and ends: a second one must not kill it as the shell's default would."""
    before = signal.getsignal(signal.SIGUSR1)
    with interrupt.Signals(pytest.fail) as signals:
        assert signals.received == 0 and signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before
    try:
        with interrupt.Signals(pytest.fail) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == interrupt.STOP
        assert signal.getsignal(signal.SIGUSR1) == signals._note
    finally:
        for name, handler in signals._before.items():
            signal.signal(name, handler)


def test_sigusr1_saves_the_step(tmp_path, warm, scenes):
    run = tmp_path / "run"
    options = ["train.steps=10000", "checkpoint.every=10000", "eval.every=10000", "train.warmup.steps=0"]
    code, took, _, err = stop(
        command(tmp_path, warm, scenes, *options), lambda: lines(run / "metrics.jsonl") > 3, signal.SIGUSR1
    )
    assert code == 0 and took < 60, err
    assert check_whole(run)[-1].name == f"step-{int(records(run)[-1]['step']):06d}"


def test_in_the_warm_up_nothing_is_kept(tmp_path, tiny, scenes):
    run = tmp_path / "run"
    line = command(tmp_path, tiny, scenes, "train.warmup.steps=100000")
    code, took, out, err = stop(line, (run / "checkpoints").exists)
    assert code == 0 and took < 60 and "stopped during the warm-up, of which nothing is kept" in out, err
    assert not check_whole(run) and not lines(run / "metrics.jsonl")


@pytest.mark.slow
def test_in_the_first_evaluation_that_is_finished(tmp_path, warm, scenes):
    """And counts: the warm-up before it is not lost, and no step is trained any more."""
    run = tmp_path / "run"
    line = command(tmp_path, warm, scenes, "train.warmup.steps=0", "eval.count=200", "train.steps=1")
    code, took, _, err = stop(line, (run / "checkpoints").exists)
    assert code == 0 and took < 100, err
    assert [row["step"] for row in records(run)] == ["0"] and [p.name for p in check_whole(run)] == ["step-000000"]


def ctrl_c(process):
    """As a terminal sends it: to the whole process group."""
    if process.poll() is not None:
        raise AssertionError(f"it had ended before: {process.communicate()}")
    os.killpg(process.pid, signal.SIGINT)


def ended(process, seconds=60):
    """(stdout, stderr) of one that ended by SIGINT within so many seconds."""
    began = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT and time.monotonic() - began < seconds, (process.returncode, err)
    assert "Traceback" not in out + err, err
    return out, err


def test_ctrl_c_saves_the_step(tmp_path, warm, scenes):
    run, line = tmp_path / "run", command(tmp_path, warm, scenes, *LONG)
    process = start(line)
    wait_for(lambda: lines(run / "metrics.jsonl") > 3, process)
    ctrl_c(process)
    out, err = ended(process)
    last = int(records(run)[-1]["step"])
    assert err == "" and out.count("interrupted: the step is finished and saved; once more leaves at once") == 1
    assert f"{last} of 10000 steps in" in out and check_whole(run)[-1].name == f"step-{last:06d}"
    finish([*line, f"train.steps={last + 1}"])
    assert [int(row["step"]) for row in records(run)] == list(range(last + 2))


def test_ctrl_c_twice_leaves_at_once(tmp_path, warm, scenes):
    """In an evaluation of minutes, which the first one lets go on."""
    process = start(command(tmp_path, warm, scenes, *LONG, "eval.count=4000", "data.min_side=28"))
    wait_for((tmp_path / "run" / "checkpoints").exists, process)
    time.sleep(1)
    ctrl_c(process)
    time.sleep(2)
    assert process.poll() is None
    ctrl_c(process)
    out, err = ended(process, seconds=5)
    assert err == "" and "once more leaves at once" in out and not check_whole(tmp_path / "run")


def test_ctrl_c_in_the_warm_up(tmp_path, tiny, scenes):
    process = start(command(tmp_path, tiny, scenes, "train.warmup.steps=100000"))
    wait_for((tmp_path / "run" / "checkpoints").exists, process)
    ctrl_c(process)
    out, err = ended(process)
    assert err == "" and "stopped during the warm-up, of which nothing is kept" in out
    assert not check_whole(tmp_path / "run")


@pytest.mark.parametrize("program", ["warmup", "evaluate", "preview", "export"])
def test_ctrl_c_where_nothing_is_saved(tmp_path, tiny, scenes, program):
    """One line, wherever it comes, after what was said of progress."""
    out, images = tmp_path / "out", ["data.min_side=112", f"data.path={scenes}", f"model.path={tiny}"]
    asked = {
        "warmup": ["configs/tiny.yaml", out, *images, "train.warmup.steps=100000"],
        "evaluate": ["configs/tiny.yaml", *images, "eval.count=4000"],
        "preview": [scenes, "--out", out, "--min-side", "112", "--count", "100"],
        "export": ["puzzles", scenes, out, "--format", "ms-swift", "--count", "100000", "--min-side", "112"],
    }
    process = Program(f"sslr1.{program}", *asked[program])
    if program == "export":
        wait_for(lambda: list(tmp_path.glob(".out-*/partial/images/*")), process)
    time.sleep(1)
    ctrl_c(process)
    _, err = ended(process)
    said = [line for line in err.splitlines() if not re.match(r"(puzzles \d|100,000 puzzles: )", line)]
    assert said == ["interrupted: nothing was written" if program == "export" else "interrupted"]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_torch_is_imported():
    """A process of its own, since that comes before all that tests.forks starts with; and one that is to pay no heed to
    it."""

    def begun(ignore):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        how = signal.SIG_IGN if ignore else signal.SIG_DFL
        line = [sys.executable, "-m", "sslr1.train", "missing.yaml"]
        return subprocess.Popen(
            line, cwd=ROOT, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, how), **pipes
        )

    for ignore in (False, True):
        process = begun(ignore)
        wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
        ctrl_c(process)
        if not ignore:
            assert ended(process) == ("", "interrupted\n")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: configuration 'missing.yaml'"), err


def test_a_library_leaves_signals_and_threads_alone():
    """What `python -m sslr1.…` settles for its process, an import doesn't."""
    code = "import os, signal; signal.signal(2, signal.default_int_handler)\n"  # whatever started this
    code += "import sslr1.setup.interrupt, sslr1.setup.processors\n"
    code += "print(signal.getsignal(2), 'OMP_WAIT_POLICY' in os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout == f"{signal.default_int_handler} False\n"


@pytest.mark.parametrize("ranks", [False, True])
def test_what_the_next_signal_does(monkeypatch, ranks):
    """torchrun hands Ctrl-C on to its ranks, which have it already; what it sends behind a second one is SIGTERM."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if ranks:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    set_to = {}
    monkeypatch.setattr(interrupt.signal, "signal", set_to.__setitem__)
    interrupt.next_ends()
    expected = (
        {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL} if ranks else {signal.SIGINT: signal.SIG_DFL}
    )
    assert set_to == expected


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.slow
def test_ctrl_c_under_torchrun(tmp_path, warm, scenes, launcher):
    """The ranks say one line, save and leave. torchrun itself ends in its own traceback; ours doesn't."""
    run, line = tmp_path / "run", command(tmp_path, warm, scenes, *LONG, ranks=2, launcher=launcher)
    process = start(line)
    wait_for(lambda: lines(run / "metrics.jsonl") > 3, process)
    ctrl_c(process)
    out, err = process.communicate(timeout=120)
    last = int(records(run)[-1]["step"])
    assert out.count("interrupted: the step is finished and saved; once more leaves at once") == 1
    assert f"{last} of 10000 steps in" in out and check_whole(run)[-1].name == f"step-{last:06d}"
    if launcher == "sslr1.torchrun":
        assert process.returncode == -signal.SIGINT and err == ""
    else:
        assert process.returncode == 1 and err.count("Traceback") == 1 and "got signal: 2" in err
    finish([*line, f"train.steps={last + 1}"])
    assert [int(row["step"]) for row in records(run)] == list(range(last + 2))


@pytest.mark.slow
def test_ctrl_c_twice_under_torchrun(tmp_path, warm, scenes):
    process = start(command(tmp_path, warm, scenes, *LONG, "eval.count=4000", ranks=2, launcher="sslr1.torchrun"))
    wait_for((tmp_path / "run" / "checkpoints").exists, process)
    for _ in range(2):
        time.sleep(2)
        assert process.poll() is None
        ctrl_c(process)
    out, err = ended(process, seconds=15)
    assert err == "" and out.count("once more leaves at once") == 1 and not check_whole(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.slow
def test_torchrun_hands_it_on(tmp_path, warm, scenes, number):
    """SIGUSR1 where it is told to. The ranks save and leave with 0; torchrun itself then reports the signal."""
    run = tmp_path / "run"
    options = ["train.steps=10000", "checkpoint.every=10000", "eval.every=10000", "train.warmup.steps=0"]
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    line = command(tmp_path, warm, scenes, *options, ranks=2, torchrun=[handled])
    code, took, out, err = stop(line, lambda: lines(run / "metrics.jsonl") > 3, number)
    assert took < 60 and "steps in" in out and f"got signal: {int(number)}" in err, (code, err)
    last = int(records(run)[-1]["step"])
    assert check_whole(run)[-1].name == f"step-{last:06d}"
    finish(command(tmp_path, warm, scenes, *options, f"train.steps={last + 1}", ranks=2))
    assert [int(row["step"]) for row in records(run)] == list(range(last + 2))
