"""A token and its log-prob for each row of logits, against torch's softmax and multinomial."""

from functools import partial

import torch
from row import Row, Sides, device_of

from sslr1 import ops

SIZES = {"cpu": (64, 151_936), "cuda": (1024, 151_936), "dry": (3, 1000)}


def rows(mode):
    B, V = SIZES[mode]
    return [
        Row(
            what=f"sampling with log-prob: B={B:,} V={V:,} {str(dtype).removeprefix('torch.')}",
            against="torch: log-softmax and multinomial",
            make=partial(sides, B, V, dtype, device_of(mode)),
        )
        for dtype in ((torch.float32,) if mode == "cpu" else (torch.float32, torch.bfloat16))
    ]


def sides(B, V, dtype, device):
    logits = (3 * torch.randn(B, V, device=device)).to(dtype)
    key = torch.randint(0, 2**62, (B,), device=device)

    def peer():
        logprobs = logits.float().log_softmax(-1)
        tokens = torch.multinomial(logprobs.exp(), 1)
        return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]

    def check(mine, _):
        tokens, logprobs = mine
        for part in range(0, B, 64):  # float64 takes four times the memory
            some = slice(part, part + 64)
            expected = logits[some].double().log_softmax(-1).gather(-1, tokens[some, None])[:, 0]
            assert (logprobs[some] - expected).abs().max() <= 1e-4

    return Sides(ours=lambda: ops.sample(logits, key), peer=peer, check=check, bytes=logits.nbytes)
