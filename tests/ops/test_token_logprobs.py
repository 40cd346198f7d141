"""Forward-only log-probs and entropy: each backend against float64, Triton in the interpreter."""

import pytest
import torch

from sslr1 import ops
from sslr1.ops import backends
from tests.interpreter import interpret

SHAPES = [(1, 1), (3, 37), (5, 4096), (4, 5003), (2, 151_936)]


def check(backend, device="cpu"):
    for N, V in SHAPES:
        for spread in (1.0, 20.0):
            D = 16
            hidden = torch.randn(N, D, device=device)
            head = spread * torch.randn(V, D, device=device) / D**0.5
            tokens = torch.randint(0, V, (N,), device=device)
            logprobs, entropy = ops.token_logprobs(hidden, head, tokens, 0.9, backend=backend, chunk=2)
            exact = (hidden.double() @ head.double().T / 0.9).log_softmax(-1)
            expected = exact.gather(-1, tokens[:, None])[:, 0]
            assert (logprobs - expected).abs().max() <= 1e-4, (N, V, spread)
            assert (entropy - -(exact.exp() * exact).sum(-1)).abs().max() <= 1e-4
            assert (logprobs <= 0).all()


@pytest.mark.parametrize("backend", ["reference"] + (["cpp"] if backends._C is not None else []))
def test_on_the_cpu(seed, backend):
    check(backend)


@pytest.mark.parametrize("backend", ["reference"] + (["cpp"] if backends._C is not None else []))
def test_large_logits_keep_their_digits(seed, backend):
    """Logits up to 90 and more: of the likeliest tokens, log-probs and entropies are as right as of small logits.
    Inputs are sixteenths, so that the products are exact."""
    hidden, head = (torch.randn(40, 64) * 16).round() / 16, (torch.randn(3000, 64) * 40).round() / 16
    exact = (hidden.double() @ head.double().T).log_softmax(-1)
    logprobs, entropy = ops.token_logprobs(hidden, head, exact.argmax(-1), backend=backend)
    assert (logprobs.double() - exact.amax(-1)).abs().max() < 5e-7
    assert (entropy.double() + (exact.exp() * exact).sum(-1)).abs().max() < 1e-6


INTERPRETED = """
from tests.ops.test_token_logprobs import check
check("triton")
"""


def test_triton_in_the_interpreter(seed):
    interpret(INTERPRETED, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_on_the_gpu(seed, backend):
    check(backend, "cuda")


def test_cuda_backend_says_what_it_needs():
    with pytest.raises(ValueError, match="CUDA"):
        ops.token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), backend="cuda")
    with pytest.raises(ValueError, match="backend"):
        ops.token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), backend="abacus")
