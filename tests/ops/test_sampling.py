"""Sampling: distribution, restriction, keys, and what a row may depend on."""

import math

import pytest
import torch

from sslr1 import ops


def keys_for(n, seed):
    return ops.fold_tensor(ops.fold("test", seed), torch.arange(n))


def g_test(counts, p):
    """p-value of a G-test, tokens of expectation under 5 pooled."""
    from scipy.stats import chi2

    expected = p * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    observed, expected = observed[keep], expected[keep]
    if len(observed) == 1:  # one token has all the probability
        return 1.0
    g = 2 * torch.special.xlogy(observed, observed / expected).sum()
    return chi2.sf(g.item(), len(observed) - 1)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8, "temperature": 1.5}]
)
def test_distribution(seed, options):
    V, n = 17, 200_000
    logits = 2 * torch.randn(V)
    suppressed = torch.tensor([3, 11])
    tokens, logprobs = ops.sample(logits.expand(n, V), keys_for(n, seed), suppress=suppressed, **options)
    z = (logits / options.get("temperature", 1.0)).double()
    p = z.clone().index_fill(0, suppressed, -math.inf).softmax(0)
    order = p.argsort(descending=True)
    kept = order[: options.get("top_k") or V]
    p = torch.zeros_like(p).index_copy(0, kept, p[kept]) / p[kept].sum()
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= options.get("top_p", 1.0)]] = 0
    p = p / p.sum()
    counts = tokens.bincount(minlength=V)
    assert (counts[p == 0] == 0).all()
    assert g_test(counts, p) > 1e-6
    assert torch.allclose(logprobs, z.log_softmax(0)[tokens].float(), atol=1e-5)  # over the whole vocabulary


def test_a_row_depends_on_itself_alone(seed):
    B, V = 64, 301
    logits, keys = 3 * torch.randn(B, V), keys_for(B, seed)
    for options in ({}, {"top_k": 5}, {"top_p": 0.6}):
        together = ops.sample(logits, keys, **options)
        order = torch.randperm(B)
        shuffled = ops.sample(logits[order], keys[order], **options)
        alone = [ops.sample(logits[i : i + 1], keys[i : i + 1], **options) for i in range(B)]
        for part in (0, 1):
            assert torch.equal(shuffled[part], together[part][order])
            assert torch.equal(torch.cat([a[part] for a in alone]), together[part])


def test_greedy_and_certain_rows(seed):
    logits = torch.randn(5, 40)
    tokens, logprobs = ops.sample(logits, keys_for(5, seed), temperature=0, suppress=logits[2].argmax()[None])
    expected = logits.index_fill(1, logits[2].argmax()[None], -math.inf).argmax(1)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, logits.log_softmax(1).gather(1, expected[:, None])[:, 0])
    certain = torch.full((1000, 9), -math.inf)
    certain[:, 4] = 0
    assert (ops.sample(certain, keys_for(1000, seed))[0] == 4).all()


def test_rows_that_are_not_numbers_say_so(seed):
    logits = torch.randn(3, 7)
    logits[1, 2] = math.nan
    logprobs = ops.sample(logits, keys_for(3, seed))[1]
    assert logprobs.isnan().tolist() == [False, True, False]
    nothing = ops.sample(logits[:1], keys_for(1, seed), suppress=torch.arange(7))[1]
    assert nothing.isnan().all()


def test_errors():
    logits, keys = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    for arguments, options, words in (
        ((logits[0], keys), {}, "logits"),
        ((logits, keys[:1]), {}, "key"),
        ((logits, keys.int()), {}, "key"),
        ((logits, keys), {"temperature": -1}, "temperature"),
        ((logits, keys), {"top_p": 0}, "top_p"),
        ((logits, keys), {"backend": "dice"}, "backend"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.sample(*arguments, **options)


def test_keys_of_tensors_are_keys_of_numbers(draw):
    for _ in range(50):
        parts = [int(x) for x in draw.integers(-(2**40), 2**40, 4)]
        whole = ops.fold("a name", *parts)
        for cut in range(4):
            tensor = ops.fold_tensor(ops.fold("a name", *parts[:cut]), *[torch.tensor([x]) for x in parts[cut:]])
            assert tensor.item() % 2**64 == whole
    u = ops.uniform(keys_for(100_000, 0))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs((u**2).mean() - 1 / 3) < 0.005
