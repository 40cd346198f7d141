"""The loss against formulas written out sequence by sequence in float64, for every backend that can run; what a row's
result may depend on; memory."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslr1 import ops
from sslr1.ops import backends, chunks, row_loss
from sslr1.ops.grpo_loss import ADVANTAGES, LOSS_TYPES
from tests.interpreter import interpret

ROOT = Path(__file__).parent.parent.parent
P, G, D, V = 4, 3, 8, 37
CPU_BACKENDS = ["reference"] + (["cpp"] if backends._C is not None else [])


def make(dtype=torch.float64, spread=3.0):
    lengths = torch.tensor([3, 0, 5, 1, 2, 2, 4, 4, 4, 0, 0, 1])
    sequence = torch.repeat_interleave(torch.arange(P * G), lengths).to(torch.int32)
    N = len(sequence)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    head = (spread * torch.randn(V, D, dtype=dtype) / D**0.5).requires_grad_()
    tokens = torch.randint(0, V, (N,))
    rewards = torch.rand(P, G)
    rewards[1] = 0.1
    return hidden, head, tokens, sequence, rewards, lengths


def by_the_book(
    hidden,
    head,
    tokens,
    sequence,
    rewards,
    lengths,
    *,
    old=None,
    ref=None,
    weights=None,
    temperature=1.0,
    loss_type="dapo",
    advantage="group",
    low=0.2,
    high=0.2,
    kl=0.0,
    bonus=0.0,
    max_tokens=20,
    with_absolute=False,
    logits=None,
):
    """logits: a list that takes each completion's (rows, logits)."""
    R = rewards.double()
    P, G = R.shape
    total, absolute, T, S = 0.0, 0.0, int(lengths.sum()), P * G
    for s in range(S):
        p, g = divmod(s, G)
        if R[p].max() == R[p].min():
            A = 0.0
        else:
            A = R[p, g] - R[p].mean()
            if advantage == "group":
                A = A / (((R[p] - R[p].mean()) ** 2).sum() / (G - 1)).sqrt().add(1e-4)
            if advantage == "batch":
                A = A / (((R - R.mean()) ** 2).sum() / (S - 1)).sqrt().add(1e-4)
        rows = (sequence == s).nonzero()[:, 0]
        if not len(rows):
            continue
        z = hidden[rows] @ head.T
        if logits is not None:
            z.retain_grad()
            logits.append((rows, z))
        z = z / temperature
        logp_V = z.log_softmax(-1)
        logp = logp_V[range(len(rows)), tokens[rows]]
        entropy = -(logp_V.exp() * logp_V).sum(-1)
        before = logp.detach() if old is None else old[rows]
        ratio = (logp - before).exp()
        if loss_type == "gspo":
            ratio = (logp - before).mean().exp().expand(len(rows))
        w = 1.0 if weights is None else weights[rows]
        if loss_type == "cispo":
            term = -w * ratio.detach().clamp(max=1 + high) * A * logp
        else:
            term = -w * torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
        if ref is not None:
            r = ref[rows] - logp
            term = term + kl * (r.exp() - r - 1)
        term = term - bonus * entropy
        each = {"dapo": 1 / T, "cispo": 1 / T, "dr_grpo": 1 / (S * max_tokens)}.get(loss_type, 1 / (S * len(rows)))
        total = total + term.sum() * each
        absolute += float(term.detach().abs().sum()) * each
    return (total, absolute) if with_absolute else total


@pytest.mark.parametrize(
    "loss_type, advantage, off_policy", list(itertools.product(LOSS_TYPES, ADVANTAGES, [False, True]))
)
def test_loss_and_gradients(seed, loss_type, advantage, off_policy):
    hidden, head, tokens, sequence, rewards, lengths = make()
    temperature = 0.7
    with torch.no_grad():
        now, _ = ops.token_logprobs(hidden, head, tokens, temperature)
    noise = lambda: now + 0.3 * torch.randn(len(tokens), dtype=torch.float64)  # noqa: E731
    old, ref, weights = (noise() if off_policy else None), noise(), torch.rand(len(tokens), dtype=torch.float64)
    out = ops.grpo_loss(
        hidden,
        head,
        tokens,
        sequence,
        rewards.double(),
        old_logprobs=old,
        ref_logprobs=ref,
        token_weights=weights,
        temperature=temperature,
        loss_type=loss_type,
        advantage=advantage,
        clip_low=0.1,
        clip_high=0.25,
        kl_coef=0.3,
        entropy_coef=0.05,
        max_tokens=20,
    )
    expected = by_the_book(
        hidden,
        head,
        tokens,
        sequence,
        rewards,
        lengths,
        old=old,
        ref=ref,
        weights=weights,
        temperature=temperature,
        loss_type=loss_type,
        advantage=advantage,
        low=0.1,
        high=0.25,
        kl=0.3,
        bonus=0.05,
    )
    assert torch.allclose(out.loss, expected, rtol=1e-12, atol=1e-14)
    got = torch.autograd.grad(out.loss, (hidden, head))
    wanted = torch.autograd.grad(expected, (hidden, head))
    for a, b in zip(got, wanted):
        assert (a - b).norm() <= 1e-12 * b.norm()
    assert (out.logprobs <= 0).all() and torch.allclose(out.logprobs, now)
    assert out.stats["zero_variance"] == pytest.approx(1 / P)
    assert out.stats["ratio_mean"] == pytest.approx(1.0) or off_policy


def check_against_float64(backend, device, shapes, dtype=torch.float32, cases=None):
    """Loss, gradients and log-probs of random cases within the bounds that we promise.

    From float32, gradients lie within 1e-5 of their norm. From bfloat16 each number of a gradient is rounded once, by
    2^-8 of itself at most; where logits' gradients S are bfloat16 too (on a GPU), so is each term of the sums S @ head
    and S^T @ hidden. Together that is 2.3e-3 of the norm in the root mean square, on a CPU 1.7e-3; the more rows, the
    less it varies.

    A loss is as wrong as its ratios, and so as its log-probs. Logits of bfloat16 inputs are not formed again in float64
    where they are large; a tensor core adds 16 products at a time and cuts the sum to 24 bits."""
    for number, (N, D, V) in enumerate(shapes):
        spread = (1.0, 5.0, 20.0)[number % 3]
        P, G = 3, 4
        shares = torch.tensor([1.0] * (P * G - 2) + [0.0, 3.0])  # one is empty, one long
        lengths = torch.multinomial(shares, max(N, 1), replacement=True)[:N].bincount(minlength=P * G)
        sequence = torch.repeat_interleave(torch.arange(P * G), lengths)
        hidden = torch.randn(N, D).to(dtype)
        temperature = 0.5 + float(torch.rand(()))
        head = (spread * temperature * torch.randn(V, D) / D**0.5).to(dtype)
        tokens = torch.randint(0, V, (N,))
        rewards = torch.rand(P, G)
        rewards[torch.randint(0, P, ())] = 0.3
        exact = [x.double().requires_grad_() for x in (hidden, head)]
        every = (exact[0].detach() @ exact[1].detach().T / temperature).log_softmax(-1)
        if N:
            found, _ = ops.token_logprobs(hidden.to(device), head.to(device), tokens.to(device), temperature, backend)
            assert (found.double().cpu() - every[torch.arange(N), tokens]).abs().max() <= 1e-4, (backend, N, D, V)
            # nobody draws a token of e^-100, and its float32 log-prob is not right to 1e-5, nor is a ratio made of it
            tokens = torch.where(every[torch.arange(N), tokens] < -50, every.argmax(-1), tokens)
        now = every[torch.arange(N), tokens]
        for loss_type, off_policy in cases or itertools.product(LOSS_TYPES, (False, True)):
            shift = 0.4 * torch.randn(N, dtype=torch.float64)
            shift[(shift.exp() - 0.9).abs() < 1e-3] = 0.0  # at a bound both sides are right
            shift[(shift.exp() - 1.25).abs() < 1e-3] = 0.0
            if loss_type == "gspo":
                shift = shift / 8 + torch.tensor([-0.3, 0.0, 0.5])[sequence % 3]
            old = (now - shift).float() if off_policy else None
            ref = (now + 0.3 * torch.randn(N)).float() if number % 2 else None
            weights = torch.rand(N) if number % 2 else None
            both = dict(temperature=temperature, loss_type=loss_type, max_tokens=30)
            bonus = 0.05 if off_policy else 0.0
            logits = []

            expected, size = by_the_book(
                *exact,
                tokens,
                sequence,
                rewards,
                lengths,
                old=None if old is None else old.double(),
                ref=None if ref is None else ref.double(),
                weights=None if weights is None else weights.double(),
                low=0.1,
                high=0.25,
                kl=0.3 if ref is not None else 0.0,
                bonus=bonus,
                with_absolute=True,
                logits=logits,
                **both,
            )
            for x in exact:
                x.grad = torch.zeros_like(x)
            if N:
                expected.backward()
            wanted, slopes = [x.grad for x in exact], torch.zeros(N, V, dtype=torch.float64)
            for rows, z in logits:
                slopes[rows] = z.grad.abs()
            terms = slopes @ exact[1].detach().abs(), slopes.T @ exact[0].detach().abs()
            at = [x.to(device).requires_grad_() for x in (hidden, head)]
            there = lambda x: None if x is None else x.to(device)  # noqa: E731
            out = ops.grpo_loss(
                *at,
                *map(there, (tokens, sequence, rewards)),
                old_logprobs=there(old),
                ref_logprobs=there(ref),
                token_weights=there(weights),
                clip_low=0.1,
                clip_high=0.25,
                kl_coef=0.3 if ref is not None else 0.0,
                entropy_coef=bonus,
                backend=backend,
                **both,
            )
            where = (backend, N, D, V, spread, loss_type, off_policy)
            loss = out.loss.double().cpu()
            bound = 1e-5
            if dtype == torch.bfloat16 and N:
                bound += (
                    2
                    * (D / 16 + 1)
                    * 2**-23
                    * float((exact[0].detach().abs() @ exact[1].detach().abs().T).max())
                    / temperature
                )
            assert abs(loss - expected) <= bound * size + 1e-12, where
            for got, want, term in zip(torch.autograd.grad(out.loss, at), wanted, terms):
                error, norm = (got.double().cpu() - want).norm(), want.norm()
                bound = 1e-5 * norm
                if dtype == torch.bfloat16:
                    rounded = chunks.product_dtype(at[0]) == dtype
                    bound = 2**-8 * norm + (1e-4 + rounded * 2**-8) * term.norm()
                    assert N < 300 or error <= (4e-3 if rounded else 2.5e-3) * norm, where
                assert got.dtype == dtype and error <= bound, where
            if N:
                assert (out.logprobs.double().cpu() - now).abs().max() <= 1e-4 and out.logprobs.max() <= 0, where


# (1, 16, 2) is tried on-policy: its gradient is one number, and off-policy the bonus may cancel it down to its rounding
SHAPES = [
    (1, 16, 37),
    (0, 8, 37),
    (33, 24, 37),
    (70, 32, 1001),
    (300, 48, 5003),
    (21, 64, 32_000),
    (9, 32, 151_936),
    (33, 16, 2),
]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_bounds_of_float64(seed, backend, dtype):
    check_against_float64(backend, "cpu", SHAPES if dtype == torch.float32 else SHAPES[:5], dtype)
    if dtype == torch.float32:
        check_against_float64(backend, "cpu", [(1, 16, 2)], cases=[(kind, False) for kind in LOSS_TYPES])


def test_within_bounds_of_float64_as_a_gpu_rounds(seed, monkeypatch):
    """Logits' gradients in bfloat16, and tensor cores' sums, each cut rather than rounded."""
    plain, plain_sum = chunks.product, chunks.add_product

    def cut(x):
        near = x.float()
        return torch.where(near.double().abs() > x.abs(), torch.nextafter(near, torch.zeros(())), near)

    def add(into, a, b):
        if a.dtype == into.dtype:
            return plain_sum(into, a, b)
        for k in range(0, a.shape[1], 16):
            into.copy_(cut(into.double() + a[:, k : k + 16].double() @ b[k : k + 16].double()))

    def product(a, b, dtype, out=None):
        if a.dtype == dtype:
            return plain(a, b, dtype, out)
        out = torch.zeros(a.shape[0], b.shape[1], dtype=dtype) if out is None else out.zero_()
        add(out, a, b)
        return out

    monkeypatch.setattr(chunks, "product_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(chunks, "product", product)
    monkeypatch.setattr(chunks, "add_product", add)
    check_against_float64("reference", "cpu", SHAPES[:4], torch.bfloat16)
    check_against_float64("reference", "cpu", [(33, 16, 2), (9, 64, 3001)], torch.bfloat16)
    check_against_float64("reference", "cpu", [(300, 48, 503)], torch.bfloat16, cases=[("dapo", True), ("gspo", False)])
    inner = row_loss._gradient
    monkeypatch.setattr(row_loss, "_gradient", lambda out, *rest: inner(out, *rest) or out.mul_(1 + 2**-6))
    with pytest.raises(AssertionError):  # more than rounding is seen
        check_against_float64("reference", "cpu", [(300, 48, 503)], torch.bfloat16, cases=[("dapo", True)])


def check_nearly_certain(backend, device="cpu"):
    """The gradient of a token with a probability of almost 1 is 1 - p: right to 1e-5 of itself, not of 1."""
    V = 300
    for gap in (4.0, 8.0, 12.0):
        logits = torch.full((2, V), -20.0)
        logits[:, 7], logits[:, 100] = 0.0, -gap
        for bonus in (0.0, 0.05):
            c = row_loss.Coefficients(*torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [bonus, bonus]]).to(device))
            got, exact = logits.to(device), logits.double()
            tokens = torch.full((2,), 7)
            row_loss.row_loss(got, tokens.to(device), c, 1.0, backend)
            c64 = row_loss.Coefficients(*(getattr(c, n).double().cpu() for n in ("advantage", "policy", "kl", "bonus")))
            row_loss.row_loss(exact, tokens, c64, 1.0, "reference")
            assert ((got.cpu() - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all(), (backend, gap, bonus)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nearly_certain_tokens(backend):
    check_nearly_certain(backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_bounds_of_float64_on_the_gpu(seed, backend, dtype):
    check_against_float64(backend, "cuda", SHAPES, dtype)
    check_nearly_certain(backend, "cuda")


INTERPRETED = """
from tests.ops.test_grpo_loss import check_against_float64, check_nearly_certain
check_nearly_certain("triton")
cases = [("dapo", True), ("cispo", False), ("gspo", True)]
check_against_float64("triton", "cpu", [(5, 8, 37), (12, 16, 4100)], cases=cases)
"""


def test_triton_in_the_interpreter(seed):
    interpret(INTERPRETED, seed)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_row_does_not_depend_on_the_others(seed, backend, loss_type):
    """At a fixed chunk height and position, whatever else there is: the same bits. And the same again."""
    N, D, V, G = 40, 24, 301, 4
    lengths = torch.tensor([6, 2, 9, 3, 1, 7, 8, 4])
    sequence = torch.repeat_interleave(torch.arange(8), lengths)
    rewards = torch.rand(2, G)
    sizes = torch.tensor([1.0, 2.0]).repeat(N // 2)[
        :, None
    ]  # logits small, and so large that some are formed in float64
    first = sizes * torch.randn(N, D), torch.randint(0, V, (N,)), -3 - torch.rand(N), -3 - torch.rand(N)
    head = torch.randn(V, D)

    def run(inputs):
        hidden, tokens, old, ref = (x.clone() for x in inputs)
        hidden.requires_grad_()
        weight = head.clone().requires_grad_()
        out = ops.grpo_loss(
            hidden,
            weight,
            tokens,
            sequence,
            rewards,
            old_logprobs=old,
            ref_logprobs=ref,
            kl_coef=0.1,
            entropy_coef=0.01,
            loss_type=loss_type,
            max_tokens=9,
            backend=backend,
            chunk=16,
        )
        return out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), out.logprobs, out.entropy

    once = run(first)
    assert all(torch.equal(a, b) for a, b in zip(once, run(first)))
    for s, size in ((0, 1.0), (3, 2.0), (5, 0.1)):
        mine = (sequence == s).nonzero()[:, 0]  # gspo's ratio is its completion's
        others = size * torch.randn(N, D), torch.randint(0, V, (N,)), -3 - torch.rand(N), -3 - torch.rand(N)
        for new, given in zip(others, first):
            new[mine] = given[mine]
        changed = run(others)
        for a, b in ((once[1], changed[1]), (once[3], changed[3]), (once[4], changed[4])):
            assert torch.equal(a[mine], b[mine])
        assert not torch.equal(once[1], changed[1])


def test_rows_without_a_gradient_take_one_product(seed, monkeypatch):
    seen = {"row_loss": 0, "row_logprobs": 0}
    kernels = {name: getattr(row_loss, name) for name in seen}
    for name in seen:

        def counted(*arguments, name=name):
            seen[name] += 1
            return kernels[name](*arguments)

        monkeypatch.setattr(row_loss, name, counted)
    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    tokens, sequence = torch.randint(0, 11, (64,)), torch.arange(64) // 8
    rewards = torch.rand(2, 4)
    rewards[0] = 1.0
    out = ops.grpo_loss(hidden, head, tokens, sequence, rewards, chunk=16)
    assert seen == {"row_loss": 2, "row_logprobs": 2}
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    assert (gradient[:32] == 0).all() and (gradient[32:] != 0).any(1).all()
    ops.grpo_loss(hidden, head, tokens, sequence, rewards, chunk=16, entropy_coef=0.1)
    assert seen["row_loss"] == 6
    with torch.no_grad():
        ops.grpo_loss(hidden, head, tokens, sequence, rewards, chunk=16)
    assert seen == {"row_loss": 6, "row_logprobs": 6}


def test_gspo_with_a_completion_longer_than_a_chunk(seed):
    lengths = torch.tensor([3, 40, 0, 5, 16, 17])
    sequence = torch.repeat_interleave(torch.arange(6), lengths)
    N = len(sequence)
    hidden = torch.randn(N, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(29, 8, dtype=torch.float64, requires_grad=True)
    tokens, rewards = torch.randint(0, 29, (N,)), torch.rand(2, 3)
    old = ops.token_logprobs(hidden, head, tokens)[0] + 0.3 * torch.randn(N, dtype=torch.float64)
    weights = torch.rand(N, dtype=torch.float64)
    options = dict(old_logprobs=old, token_weights=weights, loss_type="gspo", clip_low=0.02, clip_high=0.03)
    out = ops.grpo_loss(hidden, head, tokens, sequence, rewards.double(), chunk=16, **options)
    expected = by_the_book(
        hidden,
        head,
        tokens,
        sequence,
        rewards,
        lengths,
        old=old,
        weights=weights,
        loss_type="gspo",
        low=0.02,
        high=0.03,
    )
    assert torch.allclose(out.loss, expected, rtol=1e-12)
    got, wanted = (torch.autograd.grad(x, (hidden, head)) for x in (out.loss, expected))
    assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(got, wanted))
    assert out.stats["prepass"] * N == pytest.approx(40 + 17)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_which_tokens_are_clipped(seed, loss_type):
    """Where the gradient would go on beyond a bound: below it for what is to be rarer, above it for what is to be
    likelier; cispo has the upper bound alone, whatever the advantage; gspo's ratio is its completion's."""
    hidden, head, tokens, sequence, rewards, lengths = make()
    shift = 0.8 * torch.randn(len(tokens), dtype=torch.float64)
    old = ops.token_logprobs(hidden, head, tokens)[0] - shift
    out = ops.grpo_loss(
        hidden,
        head,
        tokens,
        sequence,
        rewards,
        old_logprobs=old,
        loss_type=loss_type,
        max_tokens=20,
        clip_low=0.1,
        clip_high=0.3,
    )
    low = high = 0
    advantages = ops.advantages(rewards.double()).reshape(-1)
    for s, part in enumerate(shift.split(lengths.tolist())):
        for x in part:
            ratio = float((part.mean() if loss_type == "gspo" else x).exp())
            low += ratio < 0.9 and advantages[s] < 0 and loss_type != "cispo"
            high += ratio > 1.3 and (advantages[s] > 0 or loss_type == "cispo")
    found = out.stats["clip_low"] * len(tokens), out.stats["clip_high"] * len(tokens)
    assert [float(x) for x in found] == pytest.approx([int(low), int(high)])


def test_backward_once_and_not_twice(seed):
    hidden, head, tokens, sequence, rewards, _ = make()
    loss = lambda: ops.grpo_loss(hidden, head, tokens, sequence, rewards).loss  # noqa: E731
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss(), hidden, create_graph=True)
    out = loss()
    plain = torch.autograd.grad(out, (hidden, head), retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(out, hidden)
    scaled = torch.autograd.grad(3 * loss(), (hidden, head))
    assert all(torch.allclose(3 * a, b) for a, b in zip(plain, scaled))
    only_hidden = torch.autograd.grad(ops.grpo_loss(hidden, head.detach(), tokens, sequence, rewards).loss, hidden)
    assert torch.equal(only_hidden[0], plain[0])


def test_registered_and_traced_through(seed):
    hidden, head, tokens, sequence, rewards, _ = make(torch.float32)
    N, A, count = len(tokens), ops.advantages(rewards).reshape(-1), torch.tensor(12.0)
    numbers = (1.0, "dapo", 0.2, 0.2, 0.1, 0.1, 0, "auto", 0, True, True)
    arguments = (hidden, head, tokens, sequence.long(), A, None, torch.full((N,), -3.0), None, count, count, *numbers)
    # not test_aot_dispatch_dynamic: the backward takes over two of the outputs, which it compares
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sslr1.grpo_loss, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.sslr1.token_logprobs, (hidden, head, tokens, 1.0, "auto", 0), test_utils=checks)

    def loss(hidden, head):
        out = ops.grpo_loss(2 * hidden, head, tokens, sequence, rewards, entropy_coef=0.1)
        return 2 * out.loss + 0 * out.stats["entropy"]

    eager = torch.autograd.grad(loss(hidden, head), (hidden, head))
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        again = torch.autograd.grad(traced(hidden, head), (hidden, head))
        assert all(torch.equal(a, b) for a, b in zip(eager, again))


PEAK = """
import sys, torch
from sslr1 import ops
N, D, V = int(sys.argv[1]), 512, 8000
hidden, head = torch.ones(N, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
sequence, tokens = torch.arange(N) * 8 // N, torch.zeros(N, dtype=torch.int64)
ops.grpo_loss(hidden, head, tokens, sequence, torch.rand(2, 4)).loss.backward()
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory in kilobytes")
def test_memory_does_not_grow_with_the_logits(seed):
    few, many = 512, 4096
    # not ru_maxrss, which a process takes over from the one that starts it
    peaks = [int(subprocess.check_output([sys.executable, "-c", PEAK, str(n)], cwd=ROOT)) for n in (few, many)]
    assert (peaks[1] - peaks[0]) * 1024 <= 3 * (many - few) * 512 * 4


def test_counts_make_cuts_invisible(seed):
    hidden, head, tokens, sequence, rewards, _ = make()
    for loss_type in LOSS_TYPES:
        options = dict(loss_type=loss_type, max_tokens=20, entropy_coef=0.1)
        whole = ops.grpo_loss(hidden, head, tokens, sequence, rewards, **options)
        parts = []
        for p in range(P):
            rows = (sequence // G == p).nonzero()[:, 0]
            parts.append(
                ops.grpo_loss(
                    hidden[rows],
                    head,
                    tokens[rows],
                    sequence[rows] - p * G,
                    rewards[p : p + 1],
                    token_count=len(tokens),
                    sequence_count=P * G,
                    **options,
                )
            )
        assert torch.allclose(whole.loss, sum(o.loss for o in parts), rtol=1e-12)
        for name, value in whole.stats.items():
            values = torch.stack([o.stats[name] for o in parts])
            together = {"ratio_min": values.min(), "ratio_max": values.max()}.get(name, values.sum())
            assert torch.allclose(together, value, atol=1e-12), name


def test_equal_rewards_are_exactly_nothing():
    for kind in ADVANTAGES:
        A = ops.advantages(torch.full((2, 8), 0.1), kind)
        assert (A == 0).all()
        assert (ops.advantages(torch.rand(3, 1), kind) == 0).all()
    assert ops.advantages(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_an_advantage_near_the_mean_keeps_its_digits(seed, kind):
    rewards = torch.rand(500, 4)
    rewards[:, 0] = rewards[:, 1:].mean(1)  # as near to the group's mean as float32 comes
    R, std = rewards.double(), {"group": lambda R: R.std(1, keepdim=True) + 1e-4, "batch": lambda R: R.std() + 1e-4}
    expected = (R - R.mean(1, keepdim=True)) / std.get(kind, lambda R: 1.0)(R)
    assert expected[:, 0].abs().median() < 1e-6 and (expected[:, 0] != 0).any()
    assert ops.advantages(rewards, kind).dtype == torch.float32
    assert torch.allclose(ops.advantages(rewards, kind).double(), expected, rtol=1e-6, atol=1e-12)


def test_no_tokens_and_one_token(seed):
    hidden, head, tokens, sequence, rewards, _ = make()
    empty = ops.grpo_loss(hidden[:0], head, tokens[:0], sequence[:0], rewards)
    gradients = torch.autograd.grad(empty.loss, (hidden, head))
    assert empty.loss == 0 and all((g == 0).all() for g in gradients)
    assert torch.isfinite(ops.grpo_loss(hidden[:1], head, tokens[:1], sequence[:1], rewards).loss)


def test_not_finite_stays_not_finite(seed):
    hidden, head, tokens, sequence, rewards, _ = make()
    for bad in (float("nan"), float("inf")):
        broken = hidden.detach().clone()
        broken[2, 3] = bad
        assert not torch.isfinite(ops.grpo_loss(broken, head, tokens, sequence, rewards).loss)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"loss_type": "dr_grpo"}, "max_tokens"),
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"advantage": "best"}, "advantage"),
        ({"old_logprobs": torch.zeros(3)}, "old_logprobs"),
        ({"backend": "abacus"}, "backend"),
        ({"advantages": torch.zeros(2, 2)}, "advantages"),
        ({"token_weights": torch.zeros(1)}, "token_weights"),
        ({"temperature": 0.0}, "temperature"),
        ({"backend": "cpp"}, "float64"),  # it computes in float32, and these are float64
    ],
)
def test_errors_name_the_argument(change, words):
    hidden, head, tokens, sequence, rewards, _ = make()
    with pytest.raises(ValueError, match=words):
        ops.grpo_loss(hidden, head, tokens, sequence, rewards, **change)


def test_bad_tensors_are_errors():
    hidden, head, tokens, sequence, rewards, _ = make()
    for arguments, words in (
        ((hidden, head, tokens, sequence.flip(0), rewards), "non-decreasing"),
        ((hidden, head, tokens + V, sequence, rewards), "tokens"),
        ((hidden, head, tokens.int(), sequence, rewards), "int64"),
        ((hidden, head, tokens, sequence.float(), rewards), "sequence"),
        ((hidden.float(), head, tokens, sequence, rewards), "dtype"),
        ((hidden[:-1], head, tokens, sequence, rewards), "tokens"),
        ((hidden[:, :-1], head, tokens, sequence, rewards), "hidden"),
        ((hidden, head, tokens, sequence, rewards[0]), "rewards"),
        ((hidden, head, tokens, sequence, rewards[:2]), "sequence"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.grpo_loss(*arguments)
