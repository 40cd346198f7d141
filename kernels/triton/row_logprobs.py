"""Log-prob of one token and entropy of each row of logits, in one read.

Cost: 4 bytes read an element, two exponentials an element. One program a row; a running maximum a block, so that

    lse = m + log s,  entropy = log s - w / s,  with s = sum e^(x-m) and w = sum (x-m) e^(x-m).
"""

import torch

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def kernel(logits, tokens, logprobs, entropy, vocabulary, stride, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    m = float("-inf")
    s = 0.0
    w = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32) * inverse_temperature
        top = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(s > 0, m - top, 0.0)  # the first block has nothing to rescale
        e = tl.where(x > float("-inf"), tl.exp(x - top), 0.0)
        d = tl.where(x > float("-inf"), x - top, 0.0)
        scale = tl.exp(shift)
        w = (w + shift * s) * scale + tl.sum(d * e, 0)
        s = s * scale + tl.sum(e, 0)
        m = top
    log_s = tl.log(s)
    picked = tl.load(logits + tl.load(tokens + row)).to(tl.float32) * inverse_temperature
    tl.store(logprobs + row, tl.minimum(picked - m - log_s, 0.0))
    tl.store(entropy + row, log_s - w / s)


def row_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0):
    """logits float32 [N, V] with contiguous rows, tokens int64 [N] -> (logprobs, entropy), float32 [N]."""
    if logits.dtype != torch.float32 or logits.stride(-1) != 1:
        raise ValueError(f"logits must be float32 with contiguous rows, got {logits.dtype}, strides {logits.stride()}")
    N, V = logits.shape
    logprobs, entropy = torch.empty(2, N, dtype=torch.float32, device=logits.device)
    if N:
        block = min(BLOCK, triton.next_power_of_2(V))
        kernel[(N,)](logits, tokens, logprobs, entropy, V, logits.stride(0), 1.0 / temperature, BLOCK=block)
    return logprobs, entropy
