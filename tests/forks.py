"""Programs in processes of their own, less the eight seconds that each spends on imports: `python -m tests.forks
SOCKET` makes the imports once, and every program is a fork of it, with arguments, environment, pipes and a process
group as given.

What a start of the interpreter or torchrun does itself is not tried this way: those tests start a process as a user
does.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import sslr1
from sslr1.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PROGRAMS = tuple(f"sslr1.{name}" for name in COMMANDS)
TAKEN_ALONG = (
    *PROGRAMS,
    "sslr1.setup.build",
    "sslr1.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "torch.utils.tensorboard",
    "nvidia.dali",
)


class Program:
    """`python -m module arguments…`, as far as tests use a Popen. Leads a process group of its own."""

    def __init__(self, module, *arguments, cwd=ROOT, **environment):
        self.args = (module, *arguments)
        (out, self.stdout), (err, self.stderr), (status, ours) = (_pipe() for _ in range(3))
        request = {
            "argv": [module, *map(str, arguments)],
            "cwd": str(cwd),
            "environ": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        }
        socket.send_fds(_server(), [json.dumps(request).encode()], [out, err, status])
        for end in (out, err, status):
            os.close(end)
        self._status, self.returncode = ours, None
        self.pid = json.loads(ours.readline())
        self._read = [[], []]
        self._readers = [
            threading.Thread(target=lambda to=to, pipe=pipe: to.append(pipe.read()), daemon=True)
            for to, pipe in zip(self._read, (self.stdout, self.stderr))
        ]
        for reader in self._readers:
            reader.start()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        self.returncode = os.waitstatus_to_exitcode(json.loads(self._status.readline()))
        self._ended.set()

    def poll(self):
        return self.returncode if self._ended.is_set() else None

    def wait(self, timeout=None):
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        for reader in self._readers:  # a process that it left behind may hold its pipes
            reader.join(10)
        return tuple("".join(parts) for parts in self._read)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself since
                os.killpg(self.pid, signal.SIGKILL)


def launch(*command, ranks=1, check=True, timeout=300, **options):
    """Run `python -m …`, as several ranks if asked, to its end; returns the finished process with what all have
    printed. options: `cwd` and the environment."""
    own = [{}] if ranks == 1 else _ranks(ranks)
    programs, end = [Program(*command, **options, **variables) for variables in own], time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in programs) and not any(p.poll() for p in programs):
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(command, timeout)
            time.sleep(0.02)
    finally:
        for p in programs:  # as torchrun: one that failed ends the others
            p.kill()
    outs, errs = zip(*(p.communicate() for p in programs))
    code = next((p.returncode for p in programs if p.returncode), 0)
    done = subprocess.CompletedProcess(command, code, "".join(outs), "".join(errs))
    if check and code:
        raise AssertionError(f"{command} exited {code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def _ranks(count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": free.getsockname()[1],
        }
    return [{k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(count)]


def _pipe():
    """(end to write to, file to read from)"""
    reading, writing = os.pipe()
    return writing, os.fdopen(reading, "r", errors="replace")


@cache
def _server():
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        # transformers imports scikit-learn where it is, and with it pyarrow, whose allocator would start a thread
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        command = [sys.executable, "-m", "tests.forks", str(its.fileno())]
        subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    size = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert size > 100_000, size  # a request is one message
    return ours


def serve(channel):
    """Fork a program for every request, until there is nobody to ask. Returns in the fork, with its argv."""
    import gc
    import importlib

    for name in TAKEN_ALONG:
        with contextlib.suppress(ImportError):  # what it is for says so when it is run
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads can't be forked safely"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, fds, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not request:
            sys.exit()
        if os.fork():
            for fd in fds:
                os.close(fd)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may pay no heed to it
        channel.close()
        out, err, status = fds
        if child := os.fork():  # this one waits for it and says how it ended
            for fd in (out, err):
                os.close(fd)
            os.write(status, f"{child}\n".encode())
            os.write(status, f"{os.waitpid(child, 0)[1]}\n".encode())
            os._exit(0)
        os.setsid()
        os.close(status)
        for fd, standard in ((out, 1), (err, 2)):
            os.dup2(fd, standard)
            os.close(fd)
        request = json.loads(request)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environ"])
        return request["argv"]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        sys.argv = serve(channel)
    if sys.argv[0] in PROGRAMS:  # what `python -m sslr1.…` does first
        sslr1.begin_program()
    for name in PROGRAMS:  # what they import stays; runpy would warn that they are there already
        sys.modules.pop(name, None)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
