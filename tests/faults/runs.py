"""Small runs to break: the command, starting it in a process group of its own, and what it left."""

import json
import os
import signal
import subprocess
import sys
import time

from safetensors import safe_open

from sslr1.model.folder import ADAPTER, holds_adapter
from sslr1.runs import checkpoint
from tests.conftest import ROOT
from tests.forks import Program

SMALL = (
    "data.min_side=112",
    "puzzles.mixture={rotation: 0.5, ordering: 0.5}",
    "rollout.prompts=4",
    "rollout.group_size=2",
    "log.samples=4",
    "train.steps=6",
    "train.warmup.steps=2",
    "train.warmup.batch=4",
    "train.threads=1",
    "eval.count=4",
    "eval.every=3",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "checkpoint.background=true",  # tests/test_train.py does without
)
LAUNCHERS = ("torch.distributed.run", "sslr1.torchrun")
CLOCK = ("timing_s/", "perf/")


def command(folder, model, images, *overrides, ranks=1, program="sslr1.train", torchrun=(), launcher=LAUNCHERS[0]):
    """Of the run folder/run."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += [launcher, f"--nproc_per_node={ranks}", "--rdzv-backend=c10d"]
        start += ["--rdzv-endpoint=localhost:0", *torchrun, "-m"]
    places = (f"model.path={model}", f"data.path={images}", f"log.dir={folder}", "log.name=run")
    return [*start, program, "configs/tiny.yaml", *places, *SMALL, *overrides]


def start(line, **environment):
    """The command as a process that leads a group of its own."""
    if line[:2] == [sys.executable, "-m"] and line[2] not in LAUNCHERS:
        return Program(*line[2:], **environment)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(line, cwd=ROOT, env=env, start_new_session=True, **pipes)


def kill(process):
    """SIGKILL to the process and all it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(line, code=0, timeout=300, **environment):
    """Run the command to its end; returns (stdout, stderr)."""
    process = start(line, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"{process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def wait_for(condition, process=None, seconds=240):
    """Until condition() holds; the process must live on until then."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to it"
        time.sleep(0.02)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def records(run):
    """metrics.jsonl without what the clock decides; NaN as a word, so that it equals itself."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if line]
    return [{k: repr(v) for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def same(run, other):
    """Whether two runs have recorded the same, bit for bit."""
    names = ("samples.jsonl", "held_out.jsonl")
    return records(run) == records(other) and all((run / n).read_bytes() == (other / n).read_bytes() for n in names)


def check_whole(run):
    """Every step-… directory of a run is complete: each file opens, and holds what the newest of the run needs."""
    found = checkpoint.steps(run / "checkpoints")
    assert [p.name for p in found] == sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    for path in found:
        assert json.loads((path / "state" / "trainer.json").read_text())["step"] == int(path.name[5:])
        names = set()
        for file in (path / "state").glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    tensors.get_tensor(name)
                    names.add(name)
        kinds = {name.split(".")[0] for name in names}
        assert kinds == ({"model", "optimizer"} if int(path.name[5:]) else {"model"}), (path, kinds)
        alone = holds_adapter(path / "hf")
        weights, settings = ADAPTER[1::-1] if alone else ("model.safetensors", "config.json")
        with safe_open(path / "hf" / weights, "pt") as tensors:
            assert all(tensors.get_tensor(name) is not None for name in tensors.keys())
        more = () if alone else ("generation_config.json",)
        for name in (settings, "tokenizer.json", "preprocessor_config.json", *more):
            json.loads((path / "hf" / name).read_text())
    return found
