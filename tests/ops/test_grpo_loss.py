"""The loss against formulas written out sequence by sequence in float64, and against finite differences."""

import itertools

import pytest
import torch

from sslr1 import ops
from sslr1.ops.grpo_loss import ADVANTAGES, LOSS_TYPES

P, G, D, V = 4, 3, 8, 37


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
):
    R = rewards.double()
    total, T, S = 0.0, int(lengths.sum()), P * G
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
        z = hidden[rows] @ head.T / temperature
        p_V = z.exp() / z.exp().sum(-1, keepdim=True)
        logp = p_V[range(len(rows)), tokens[rows]].log()
        entropy = -(p_V * p_V.log()).sum(-1)
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
        total = total + term.sum() * {"dapo": 1 / T, "cispo": 1 / T, "dr_grpo": 1 / (S * max_tokens)}.get(
            loss_type, 1 / (S * len(rows))
        )
    return total


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
        ((hidden[:-1], head, tokens, sequence, rewards), "tokens"),
        ((hidden[:, :-1], head, tokens, sequence, rewards), "hidden"),
        ((hidden, head, tokens, sequence, rewards[0]), "rewards"),
        ((hidden, head, tokens, sequence, rewards[:2]), "sequence"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.grpo_loss(*arguments)
