"""The CUDA kernel of `row_loss` on the CPU, by tests/emulation: every way of a row through it, against float64."""

import ctypes
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sslr1.ops import backends
from tests.emulation import Launch, read
from tests.ops.test_row_loss_kernels import assert_near, check, draw_coefficients, functions

SOURCE = Path(__file__).parent.parent.parent / "csrc" / "cuda" / "row_loss.cu"
ENTRY = "sslr1::row_loss_cuda"
HOPPER = dict(capability=9, shared_limit=227 * 1024)
SMALL = dict(capability=12, shared_limit=99 * 1024)  # GeForce and RTX cards from the 50 series on
# Shared memory of Hopper's multiprocessor, of which each block takes 1 KB more than it asks for
BYTES_OF_SM = 228 * 1024
# The blocks of a cluster and the bytes of shared memory each that a row of so many logits takes, 0 blocks: no cluster
PLANS = {
    **{1: (1, 0), 19_075: (1, 76_288), 19_076: (2, 38_160), 38_147: (2, 76_288), 38_148: (4, 38_160)},
    **{76_291: (4, 76_288), 76_292: (8, 38_160), 151_936: (8, 75_968), 152_579: (8, 76_288), 152_580: (8, 76_304)},
    **{462_851: (8, 231_424), 462_852: (0, 0)},
}


def declare(emulator, mode, logits, tokens, logprobs, entropy, *rest):
    """Tell the emulator which memory csrc/row_loss.h lets a call read and write: of rows, nothing between them."""
    *columns, g, n, V, stride, _, _, _, _, out, out_stride, bfloat16, _ = rest
    emulator.forget()
    in_place, size = out == logits, 2 if bfloat16 else 4
    for row in range(n):
        emulator.declare(logits + 4 * stride * row, 4 * V, writable=in_place and mode > 0)
        if not in_place:
            emulator.declare(out + size * out_stride * row, size * V, readable=False, writable=True)
    emulator.declare(tokens, 8 * n)
    for statistic in (logprobs, entropy):
        emulator.declare(statistic, 4 * n, readable=mode == 2, writable=mode < 2)
    for column in filter(None, {*columns, g}):
        emulator.declare(column, 4 * n)


@pytest.fixture
def kernels(monkeypatch):
    """kernels(emulator): the functions of backend "cuda", on the emulator."""

    def on(emulator):
        def row_loss_cuda(*arguments):
            declare(emulator, *arguments)
            emulator(*arguments)

        monkeypatch.setattr(backends, "_C", SimpleNamespace(row_loss_cuda=row_loss_cuda, has_cuda=True))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        return functions("cuda")

    return on


@pytest.fixture(scope="session")
def emulator(emulate):
    return emulate("row_loss", SOURCE, ENTRY)


def draw_combinations(seed):
    """Flags for a gradient in place, apart in float32, and apart in bfloat16, unaligned and aligned."""
    rng = random.Random(seed)
    return [rng.choice([i for i in range(16) if (i + i // 4) % 4 == target]) for target in range(4)]


@pytest.mark.parametrize("order", ["random", "in turn", "last first"])
def test_one_block(seed, emulator, kernels, order):
    emulator.configure(order, seed)
    check(kernels(emulator), vocabularies=(1, 2, 3, 37, 1027, 5003) if order == "random" else (130, 5003))


@pytest.mark.parametrize(
    "V, device, cluster",
    [
        (19_077, HOPPER, 2),
        (38_150, HOPPER, 4),
        (76_293, HOPPER, 8),
        (200_707, SMALL, 8),
        (200_708, SMALL, 1),
        (5003, dict(capability=8), 1),
    ],
)
def test_where_the_way_changes(seed, emulator, kernels, V, device, cluster):
    """The shortest rows for 2, 4 and 8 blocks; the longest piece; a row too long for clusters; no clusters at all."""
    emulator.configure(seed=seed, **device)
    check(kernels(emulator), vocabularies=[V], combinations=draw_combinations(seed))
    assert max(launch.cluster for launch in emulator.launches()) == cluster


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "in turn", "last first"])
@pytest.mark.parametrize(
    "V",
    [4096, *range(19_072, 19_078), 25_000, 25_001, 38_144, 38_150, 60_001, 60_003, 76_289, 76_300]
    + [151_936, 152_064, 152_577, 300_003, 462_848, 462_860, 500_000],
)
def test_all_flags(seed, emulator, kernels, V, order):
    emulator.configure(order, seed)
    check(kernels(emulator), vocabularies=[V])


@pytest.mark.parametrize("V", PLANS)
def test_launch(seed, emulator, kernels, V):
    """Blocks and shared memory as planned, three blocks on a multiprocessor where their pieces are small."""
    blocks, dynamic_bytes = PLANS[V]
    emulator.configure(seed=seed)
    logits, tokens = 4 * torch.randn(2, V), torch.randint(0, V, (2,))
    exact = logits.double()
    c = draw_coefficients(functions("reference").row_logprobs(exact, tokens, 1.0)[0], True, True, False, True)
    statistics = functions("reference").row_loss(exact, tokens, c.each(torch.Tensor.double), 1.0)
    found = kernels(emulator).row_loss(logits, tokens, c, 1.0)
    for given, expected in zip((*found, logits), (*statistics, exact)):
        assert_near(given, expected, V)
    (launch,) = emulator.launches()
    assert launch == Launch(2 * max(blocks, 1), max(blocks, 1), 512, dynamic_bytes, launch.static_bytes)
    assert launch.static_bytes <= 512
    assert (3 * (dynamic_bytes + 512 + 1024) <= BYTES_OF_SM) == (V < 152_580 or not blocks)


@pytest.fixture(scope="session")
def faulty(emulate):
    return emulate("row_loss_faulty", SOURCE, ENTRY, planted())


def planted():
    """The source with every fault in it, the one whose number is in `fault` at work."""
    text = read(SOURCE)
    for number, (replaced, _, _) in enumerate(FAULTS.values(), 1):
        for right, wrong in replaced.items():
            assert text.count(right) == 1, f"the kernel has changed: {right!r} is in it {text.count(right)} times"
            if right.split("//")[0].rstrip().endswith(";"):
                text = text.replace(right, f"if (is({number})) {{ {wrong} }} else {{ {right}\n}}")
            else:
                text = text.replace(right, f"(is({number}) ? {wrong} : {right})")
    unseen = '__attribute__((no_sanitize("thread")))'  # by the machine: it is none of the kernel's memory
    return f'extern "C" {{ int fault = 0; {unseen} bool is(int number) {{ return fault == number; }} }}\n{text}'


WRONG = "Tensor-likes are not close|Scalars are not close"
WARP_SUMS = "of_warp[t / 32] = sums;"
TO_PEER = "*cluster.map_shared_rank(of_block + rank, lane)"
# What stands for what in the source, how that is found, and in rows of which length
FAULTS = {
    "copies are not awaited": ({"wait_for_copy(arrived + c);": ""}, "nobody has written", 1027),
    "copies do not see their barriers": (
        {'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");': ""},
        "no fence",
        37,
    ),
    "threads do not see the barriers": (
        {"__syncthreads();  // the threads see the barriers": ""},
        "not initialised",
        1027,
    ),
    "a copy takes too much": ({"min(kChunk, count - c * kChunk)": "kChunk"}, "outside of the kernel's memory", 5003),
    "warps' sums are read too early": (
        {f"if (lane == 0) {WARP_SUMS}\n  __syncthreads();": f"if (lane == 0) {WARP_SUMS}"},
        "nobody has written",
        1027,
    ),
    "warps' sums are read too early, streaming": (
        {f"if (t % 32 == 0) {WARP_SUMS}\n    __syncthreads();": f"if (t % 32 == 0) {WARP_SUMS}"},
        "nobody has written",
        1027,
    ),
    "the token's logit is overwritten too early": (
        {"__syncthreads();  // nobody overwrites the token's logit before everybody has it": ""},
        WRONG,
        1027,
    ),
    "blocks write to others that have not started": (
        {"__cluster_barrier_arrive_relaxed();": "", "__cluster_barrier_wait();": ""},
        "has not started",
        19_077,
    ),
    "blocks' sums are read too early": ({"cluster.sync();": "__syncthreads();"}, "nobody has written|has left", 19_077),
    "blocks read from others that have left": (
        {
            f"if (lane < blocks) {TO_PEER} = sums;": "if (t == 0) of_block[rank] = sums;",
            "of_block[lane]": "*cluster.map_shared_rank(of_block + lane, lane)",
        },
        "has left",
        19_077,
    ),
    "shares are rounded down": ({"(row.count + blocks - 1) / blocks": "row.count / blocks"}, WRONG, 19_081),
    "quads behind the row are read": (
        {"at < row.count ? row.quads[at] : none()": "row.quads[at]"},
        "reads .* outside of the kernel's memory",
        1027,
    ),
    "quads behind the row are written": (
        {"if (at < row.count) target.write(at, gradient(x[i]));": "target.write(at, gradient(x[i]));"},
        "writes .* outside of the kernel's memory",
        1027,
    ),
    "stores are taken to be aligned": (
        {"aligned = reinterpret_cast<std::uintptr_t>(quads) % (4 * sizeof(Out)) == 0;": "aligned = true;"},
        "no multiple of",
        37,
    ),
}


@pytest.mark.parametrize("name", ["none", *FAULTS])
def test_finds_faults(seed, faulty, kernels, name):
    number = ["none", *FAULTS].index(name)
    ctypes.c_int.in_dll(faulty.library, "fault").value = number

    def checks(vocabularies, attempts):
        for attempt in range(attempts):
            faulty.configure(seed=seed + attempt)
            check(kernels(faulty), vocabularies=vocabularies, combinations=draw_combinations(seed + attempt))

    if name == "none":
        return checks((37, 19_081), 1)
    _, found, V = FAULTS[name]
    with pytest.raises((AssertionError, RuntimeError), match=found):
        checks([V], 20)
