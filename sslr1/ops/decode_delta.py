"""A linear layer's decode step from its products to what the output's product takes: convolution with SiLU, the decays,
one step of the gated delta rule over states in place, and the gated norm.

    out = norm(delta_step(conv(mixed), g, beta)) silu(z);    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b)

Cost: `gated_delta_step`'s and `causal_conv_step`'s; on a GPU a launch for each of convolution, step and norm.
"""

import torch
import torch.nn.functional as F

from sslr1.ops import backends, delta_rule, short_conv
from sslr1.ops.decode_rows import choose


def step_delta(rows, weight, A_log, dt_bias, norm, states, tails, samples, *, eps=1e-6, backend="auto"):
    """One token for each of n samples, whose states and tails it moves on in place.

    rows [R, W], R >= n, contiguous: channels (queries, keys [H_k, d_k] each, values [H_v, d_v]), z [H_v, d_v], b [H_v],
    a [H_v]. weight [channels, 4] of the convolution; A_log, dt_bias [H_v]; norm [d_v]: the gated norm's weight; states
    [samples, H_v, d_k, d_v], tails [samples, channels, 3] and samples int64 [n] as `gated_delta_step` and
    `causal_conv_step` have them. Returns [R, H_v * d_v] of rows' dtype, zeros in rows after n. backend: "reference",
    "cpp" (float32), "triton", or "auto".
    """
    heads, d_k, d_v = states.shape[1:]
    channels = weight.shape[0]
    if rows.shape[1] != channels + heads * (d_v + 2) or not rows.is_contiguous():
        raise ValueError(f"rows are {list(rows.shape)}, not {channels} channels and {heads} heads of {d_v}, contiguous")
    if tails.shape[1:] != (channels, short_conv.CONTEXT) or not (tails.is_contiguous() and states.is_contiguous()):
        raise ValueError(f"tails must be [samples, {channels}, 3], and they and states contiguous: they are written to")
    return torch.ops.sslr1.step_delta(rows, weight, A_log, dt_bias, norm, states, tails, samples, eps, backend)


@torch.no_grad()
def _op_step_delta(rows, weight, A_log, dt_bias, norm, states, tails, samples, eps, backend):
    backend = choose("step_delta", backend, rows)
    heads, d_k, d_v = states.shape[1:]
    channels, n = weight.shape[0], len(samples)
    keys = (channels - heads * d_v) // 2
    if backend == "cpp":
        out = rows.new_empty(len(rows), heads * d_v)
        out[n:] = 0
        tensors = rows, *(x.float().contiguous() for x in (weight, A_log, dt_bias, norm)), states, tails, samples, out
        sizes = n, rows.shape[1], keys // d_k, heads, d_k, d_v
        backends._C.step_delta([x.data_ptr() for x in tensors], sizes, eps, torch.get_num_threads())
        return out
    x, z, b, a = rows[:n].split((channels, heads * d_v, heads, heads), -1)
    if backend == "triton":
        from sslr1.kernels import recurrent, step

        mixed = recurrent.causal_conv_step(tails, x, weight, samples)
        q, k, v = _heads(mixed, keys, heads, d_k, d_v)
        found = step.delta_step(states, q, k, v, a, b, A_log, dt_bias, samples)
        return step.gated_norm(found, z, norm, eps, len(rows))
    wide = torch.promote_types(rows.dtype, torch.float32)
    mixed = short_conv._op_step(tails, x, weight.to(x.dtype), samples, "reference")
    g = -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(x.dtype))
    found = delta_rule._op_step(
        states, *_heads(mixed, keys, heads, d_k, d_v), g, b.sigmoid(), samples, d_k**-0.5, True, "reference"
    ).to(wide)
    found = (found * torch.rsqrt(found.pow(2).mean(-1, keepdim=True) + eps)).to(rows.dtype)
    out = (norm * found * F.silu(z.unflatten(-1, (heads, d_v)).to(wide))).to(rows.dtype).reshape(n, heads * d_v)
    return F.pad(out, (0, 0, 0, len(rows) - n)) if len(rows) > n else out


def _heads(mixed, keys, heads, d_k, d_v):
    q, k, v = mixed.split((keys, keys, heads * d_v), -1)
    return q.unflatten(-1, (keys // d_k, d_k)), k.unflatten(-1, (keys // d_k, d_k)), v.unflatten(-1, (heads, d_v))


backends.register(
    "step_delta(Tensor rows, Tensor weight, Tensor A_log, Tensor dt_bias, Tensor norm, Tensor(a!) states, "
    "Tensor(b!) tails, Tensor samples, float eps, str backend) -> Tensor",
    _op_step_delta,
    lambda rows, weight, A_log, dt_bias, norm, states, *rest: rows.new_empty(
        len(rows), states.shape[1] * states.shape[3]
    ),
)
