"""The machine that CUDA kernels run on in tests: what it computes, and the mistakes that it finds."""

from pathlib import Path

import pytest
import torch

from tests.emulation import ORDERS, Launch, translate

BLOCKS, THREADS = 4, 64


@pytest.fixture(scope="module")
def trial(emulate):
    return emulate("trial", Path(__file__).parent / "trial.cu", "trial::run")


def run(trial, task, cluster=2, threads=THREADS, dynamic_bytes=16):
    """(in, out) of a task, int32 [BLOCKS, THREADS]."""
    numbers = torch.randint(2**31 - 1, (3, BLOCKS, THREADS), dtype=torch.int32)[::2]  # apart
    trial.forget()
    trial.declare(numbers[0].data_ptr(), numbers[0].nbytes)
    trial.declare(numbers[1].data_ptr(), numbers[1].nbytes, readable=False, writable=True)
    trial(task, numbers[0].data_ptr(), numbers[1].data_ptr(), BLOCKS, cluster, threads, dynamic_bytes)
    return numbers


@pytest.mark.parametrize("order", ORDERS)
def test_threads_meet(seed, trial, order):
    trial.configure(order, seed)
    thread = torch.arange(THREADS, dtype=torch.int32)
    lane = thread % 32
    down = torch.where(lane < 30, thread + 2, thread)
    expected = thread // 32 * 32 + 3 + 100 * (thread ^ 1) + 10_000 * down + 1_000_000 * 0xAA * (lane < 8)
    assert torch.equal(run(trial, 0)[1], expected.expand(BLOCKS, -1))

    given, found = run(trial, 1)
    assert torch.equal(found, given.flip(1))
    given, found = run(trial, 2)
    assert torch.equal(found, given[[1, 0, 3, 2]])
    given, found = run(trial, 3)
    assert torch.equal(found[:, :32], given[:, :32].flip(1))
    given, found = run(trial, 4)
    assert torch.equal(found, given[:, ::32].repeat_interleave(32, 1))
    given, found = run(trial, 20)
    assert (found == given[0, 3]).all()
    assert set(trial.launches()) == {Launch(BLOCKS // 2, 2, THREADS, 16, 4 * THREADS + 16)}


MISTAKES = {
    8: "comes to a (shuffle|vote), other lanes to a (shuffle|vote)",
    9: "a shuffle whose mask leaves it out|lane 1, which the mask leaves out",
    10: "deadlock: 124 threads wait for __syncthreads, 4 threads wait for a vote",
    11: r"reads 4 bytes at 0x\w+, shared memory that nobody has written \[trial.cu:\d+\]",
    12: "writes 4 bytes at .*outside of any shared variable",
    13: "reads 4 bytes at .*outside of the kernel's memory",
    14: "writes 4 bytes at .*memory that it is not to",
    15: r"no multiple of 8 \[.*trial.cu:\d+\]",
    16: "writes 4 bytes at .*shared memory of a block that has (left|not started)",
    17: "maps to block 2, beyond its cluster",
    18: "leaves with an arrival at the cluster's barrier",
    19: "arrives at the cluster's barrier twice",
    21: "leaves before a bulk copy into it has arrived",
    22: "a bulk copy of 16 bytes .* not all of them multiples of 16",
    23: "a bulk copy to memory outside of any shared variable",
    24: "arrives once too often at a barrier of copies",
    25: "a bulk copy on a barrier that no fence has shown",
}


@pytest.mark.parametrize("task", MISTAKES)
def test_finds(seed, trial, task):
    with pytest.raises(RuntimeError, match=MISTAKES[task]):
        for attempt in range(20):
            trial.configure(seed=seed + attempt)
            run(trial, task)
    trial.configure(seed=seed)  # and goes on
    given, found = run(trial, 1)
    assert torch.equal(found, given.flip(1))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(cluster=16), "clusters of 16 blocks in a grid of 2"),
        (dict(threads=2048), "a block of 2048 threads"),
        (dict(dynamic_bytes=50_000), "50000 bytes of dynamic shared memory; allowed are 49152"),
    ],
)
def test_refuses_a_launch(trial, given, message):
    with pytest.raises(RuntimeError, match=message):
        run(trial, 1, **given)


def test_refuses_what_it_cannot_translate():
    with pytest.raises(ValueError, match="can't translate '__shared__ float"):
        translate("__global__ void f() {\n  __shared__ float x[2] = {};\n}")
