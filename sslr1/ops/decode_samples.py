"""What a decode step reads of its samples and writes back: one launch before the layers, one behind the draw.

By their numbers samples have `tokens` int64 and `logprobs` float32 [S, T], `counts` int64 [S] of tokens drawn, `live`
bool [S], `addresses` int64 [S], the keys of their draws but for the position, and `first_position` int64 [S].

Cost: some 60 bytes a row and 13 a sample of all, which is nothing; as separate operations these were 51 launches.
"""

import torch

from sslr1.ops import backends
from sslr1.ops.keys import fold_tensor


def step_begin(samples, tokens, counts, live, addresses, first_position, own_lengths, *, backend="auto"):
    """What the step's rows are given, int64 [n] each for `samples` int64 [n]: the token drawn last, its position, how
    many keys and values the sample has already, and the next draw's key.

    own_lengths, int32 and as many as samples, becomes `counts` where `live`, else 0. backend: "reference", "triton"
    (CUDA), or "auto".
    """
    given = samples, tokens, counts, live, addresses, first_position, own_lengths
    if backend == "auto" and samples.device.type == "cpu":  # torch's dispatcher costs more than this
        return _begin(*given)
    return torch.ops.sslr1.step_begin(*given, backend)


def step_end(samples, drawn, drawn_logprobs, stop, most, tokens, logprobs, counts, live, *, backend="auto"):
    """Note what was drawn, `drawn` int64 and `drawn_logprobs` float32 [n], for those of `samples` [n] that live; they
    live on unless the token is one of `stop` int64 or their tokens are `most`, an int64 scalar on the device, by now.

    A sample that is done keeps what it has. No number may stand in `samples` twice. backend: as for `step_begin`.
    """
    given = samples, drawn, drawn_logprobs, stop, most, tokens, logprobs, counts, live
    if backend == "auto" and samples.device.type == "cpu":
        return _end(*given)
    return torch.ops.sslr1.step_end(*given, backend)


def _begin(samples, tokens, counts, live, addresses, first_position, own_lengths):
    drawn = counts[samples]
    written = drawn - 1
    own_lengths.copy_(torch.where(live, counts, 0).view_as(own_lengths))
    token = tokens[samples, written.clamp(min=0)]  # of a place that was never filled there is none
    return token, first_position[samples] + written, written, fold_tensor(addresses[samples], drawn)


def _end(samples, drawn, drawn_logprobs, stop, most, tokens, logprobs, counts, live):
    before, going = counts[samples], live[samples]
    at = samples, before.clamp(max=tokens.shape[1] - 1)
    tokens[at] = torch.where(going, drawn, tokens[at])
    logprobs[at] = torch.where(going, drawn_logprobs, logprobs[at])
    after = before + going
    counts[samples] = after
    live[samples] = going & (drawn[:, None] != stop).all(1) & (after < most)


def _op_step_begin(*given):
    *given, backend = given
    if backends.choose("step_begin", backend, given[0].device, ("triton",)) == "reference":
        return _begin(*given)
    from sslr1.kernels import step as kernel

    return kernel.begin(*given)


def _op_step_end(*given):
    *given, backend = given
    if backends.choose("step_end", backend, given[0].device, ("triton",)) == "reference":
        return _end(*given)
    from sslr1.kernels import step as kernel

    kernel.end(*given)


backends.register(
    "step_begin(Tensor samples, Tensor tokens, Tensor counts, Tensor live, Tensor addresses, Tensor first_position, "
    "Tensor(a!) own_lengths, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_step_begin,
    lambda samples, *rest: tuple(torch.empty_like(samples) for _ in range(4)),
)
backends.register(
    "step_end(Tensor samples, Tensor drawn, Tensor drawn_logprobs, Tensor stop, Tensor most, Tensor(a!) tokens, "
    "Tensor(b!) logprobs, Tensor(c!) counts, Tensor(d!) live, str backend) -> ()",
    _op_step_end,
    lambda *given: None,
)
