"""Disks that are full, files that may not grow, folders that can't be written: one line, and the run goes on when it is
mended."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sslr1 import config, files
from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.runs.records import JsonLines
from sslr1.setup import entry
from tests.faults.runs import check_whole, command, finish, lines, records, same, start, wait_for


@contextlib.contextmanager
def disk(folder, size):
    """A file system of its own of so many MiB; the test is skipped where mounting is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("file systems may not be mounted here")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def one_line(err, *words):
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_checkpoint_that_can_not_be_written(tmp_path, unbroken, warm, scenes, background):
    """Files may not grow past 5 MB: weights alone fit, weights with their moments (8 MB) don't."""
    line, run = command(tmp_path, warm, scenes, f"checkpoint.background={background}"), tmp_path / "run"
    limited = [sys.executable, "-c", LIMITED, "5000000", *line[2:]]
    _, err = finish(limited, code=2)
    one_line(
        err,
        "checkpoint",
        "step-000002 could not be written: File too large. Earlier ones are whole",
        "the same command again",
    )
    assert [path.name for path in check_whole(run)] == ["step-000000"]
    assert not list((run / "checkpoints").glob("partial-*"))
    assert "going on from" in finish(line)[0] and same(run, unbroken)


def test_a_file_system_without_locks_and_flushes_of_folders(tmp_path, unbroken, warm, scenes):
    """It trains, checkpoints and goes on as elsewhere, and says what nobody guards."""
    line, run = command(tmp_path, warm, scenes, program="tests.faults.lockless"), tmp_path / "run"
    for steps in (3, 6):
        _, err = finish([*line, f"train.steps={steps}"])
        warnings = err.splitlines()
        assert len(warnings) == 2 and all(w.startswith(f"warning: the file system of {run}") for w in warnings), err
        assert "has no locks (Function not implemented): nothing keeps a second run out" in warnings[0]
        assert "can't flush folders (Invalid argument)" in warnings[1] and "loses power" in warnings[1]
    check_whole(run)
    assert same(run, unbroken)


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.EACCES, errno.EINVAL]
)
def test_which_locks_are_done_without(tmp_path, monkeypatch, capfd, number):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    if number in (errno.EIO, errno.EACCES, errno.EINVAL):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            files.lock(tmp_path / "run.lock")
    else:
        for _ in range(2):
            files.lock(tmp_path / "run.lock").close()
        assert capfd.readouterr().err.count("has no locks") == 1


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_was_taken_away_is_none(tmp_path, monkeypatch, again):
    """By a start that was refused, between the look for the file and the lock; also where another has made it anew."""
    path, flock = tmp_path / "run.lock", fcntl.flock

    def late(file, how):
        path.unlink()
        if again:
            path.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError):
        files.lock(path)
    monkeypatch.undo()
    files.lock(path).close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, errno.ENOSPC])
def test_which_flushes_are_done_without(tmp_path, monkeypatch, capfd, number):
    """Of folders alone: a file that can't be flushed may be lost with its content."""

    def refuse(handle):
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        files.flush(tmp_path / "file")
    if number in (errno.EIO, errno.ENOSPC):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            files.flush(tmp_path)
    else:
        files.flush(tmp_path)
        files.flush(tmp_path)
        assert capfd.readouterr().err.count("can't flush folders") == 1


@pytest.mark.slow
def test_the_weights_that_can_not_be_written(tmp_path, warm, scenes):
    """Not even the first checkpoint: whatever writes hf/, its error is one line too."""
    line = command(tmp_path, warm, scenes, "train.warmup.steps=0")
    _, err = finish([sys.executable, "-c", LIMITED, "1000000", *line[2:]], code=2)
    one_line(err, "step-000000 could not be written: ", "File too large")
    assert not check_whole(tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk(tmp_path, unbroken, warm, scenes):
    """First no room for a checkpoint, then none for a record; each time the run goes on when there is."""
    with disk(tmp_path / "disk", 20) as change:
        line, run = command(tmp_path / "disk", warm, scenes), tmp_path / "disk" / "run"
        _, err = finish(line, code=2)
        one_line(err, "could not be written: ", "No space left on device", "Earlier ones are whole")
        assert check_whole(run) and not list((run / "checkpoints").glob("partial-*"))
        change("size=64m")
        finish(line)
        assert same(run, unbroken)
        longer = [*line, "train.steps=100000", "eval.every=100000", "checkpoint.every=100000"]
        process = start(longer)
        wait_for(lambda: lines(run / "metrics.jsonl") > 9, process)
        with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2
        one_line(err, "can't be written: No space left on device", "the run goes on from its last checkpoint")
        assert check_whole(run)[-1].name == "step-000006"
        (tmp_path / "disk" / "filler").unlink()
        finish([*line, "train.steps=8", "eval.every=100000"])
        assert [int(row["step"]) for row in records(run)] == list(range(9))


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(UserError, match=r"folder .*/run can't be written to \(File exists\): set log.dir and log.name"):
        entry.Claim(tmp_path / "run", config.check({"model": {"path": "m"}, "data": {"path": "d"}}))


@pytest.mark.slow
def test_a_read_only_disk(tmp_path, warm, scenes):
    with disk(tmp_path / "disk", 64) as change:
        shutil.copytree(warm, tmp_path / "disk" / "model")
        change("ro")
        _, err = finish(command(tmp_path / "disk", tmp_path / "disk" / "model", scenes), code=2)
        one_line(err, "can't be written to (Read-only file system)")


def test_records_say_what_they_can_not_do(tmp_path):
    log = JsonLines("/dev/full")
    with pytest.raises(UserError, match="/dev/full can't be written: No space left on device"):
        log.write({"step": 1})
    with pytest.raises(UserError, match="nowhere/x can't be written: No such file or directory"):
        write_whole(tmp_path / "nowhere" / "x", "")


def test_a_record_that_is_taken_bit_by_bit(tmp_path):
    """What a system call may do."""
    taken = []
    log = JsonLines(tmp_path / "metrics.jsonl")
    log._file = SimpleNamespace(write=lambda data: taken.append(bytes(data[:3])) or len(data[:3]))
    log.write({"step": 12345})
    assert b"".join(taken) == b'{"step": 12345}\n'


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "config.yaml"
    write_whole(path, "before")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
    code += f"from sslr1.files import write_whole; write_whole({str(path)!r}, 'x' * 100000)"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert "UserError" in done.stderr and path.read_text() == "before"
    write_whole(path, "after")
    assert path.read_text() == "after" and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_record_cut_short_is_dropped_and_separators_within_are_not(tmp_path, draw):
    path = tmp_path / "samples.jsonl"
    rows = [{"step": n, "text": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"} for n in range(5)]
    log = JsonLines(path)
    for row in rows:
        log.write(row)
    assert log.read() == rows
    whole = path.read_bytes()
    last = len(whole.split(b"\n")[-2]) + 1
    path.write_bytes(whole[: len(whole) - 2 - int(draw.integers(0, last - 2))])
    assert log.read() == rows[:4]
    log.cut(4)
    log.write(rows[4])
    assert path.read_bytes() == whole
    log.cut(2)
    assert log.read() == rows[:3]
    log.cut(-1)
    assert log.read() == [] and path.read_bytes() == b""
