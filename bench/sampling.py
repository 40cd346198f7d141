"""A token and its log-prob for each row of logits, against torch's softmax and multinomial."""

import torch

from sslr1 import ops

V = 151_936


def rows():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        yield row(1024 if device == "cuda" else 64, dtype, device)


def row(B, dtype, device):
    logits = (3 * torch.randn(B, V, device=device)).to(dtype)
    key = torch.randint(0, 2**62, (B,), device=device)

    def ours():
        return ops.sample(logits, key)

    def peer():
        logprobs = logits.float().log_softmax(-1)
        tokens = torch.multinomial(logprobs.exp(), 1)
        return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]

    tokens, logprobs = ours()
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (logprobs - expected).abs().max() <= 1e-4
    return {
        "what": f"sampling with log-prob: B={B:,} V={V:,} {str(dtype).removeprefix('torch.')}",
        "against": "torch: log-softmax and multinomial",
        "ours": ours,
        "peer": peer,
        "goal": "",
        "bytes": logits.nbytes,
        "device": device,
    }
