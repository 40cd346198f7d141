"""The short causal convolution before a recurrent layer, SiLU behind it: over packed groups, and one step of it for
decoding.

    y_t = sum over j of weight[:, 3 - j] x_(t - j), j = 0 … 3;    out_t = y_t sigmoid(y_t)

for each channel by itself, where a completion's rows before its first are its prompt's last, and there are zeros before
a prompt.
"""

import torch
import torch.nn.functional as F

from sslr1.ops.state_layout import CONTEXT, StateLayout


def causal_conv(x, weight, layout, *, backend="auto"):
    """The convolution and SiLU over a packed row of groups `[prompt | c1 … cG]`; differentiable in x and weight.

    x [T, channels]; weight [channels, 4] (a Conv1d's [channels, 1, 4] without its middle), the last column for the row
    itself; layout: a `StateLayout` of T tokens on their device, or what makes one. Returns [T, channels] of x's dtype.
    Sums are float32 (float64 for float64). Raises ValueError for another width and for a layout of another T.
    """
    layout = layout if isinstance(layout, StateLayout) else StateLayout(layout).to(x.device)
    _check(x, weight)
    if layout.tokens != len(x):
        raise ValueError(f"groups cover {layout.tokens} tokens, x has {len(x)}")
    return _reference(x, weight, layout.context)


def _check(x, weight):
    if weight.shape != (x.shape[1], CONTEXT + 1):
        raise ValueError(f"weight must be [{x.shape[1]}, {CONTEXT + 1}], got {list(weight.shape)}")


def _reference(x, weight, context):
    wide = torch.promote_types(x.dtype, torch.float32)
    whole, weight = x.to(wide), weight.to(wide)
    y = whole * weight[:, CONTEXT]
    for j, rows in enumerate(context, 1):
        before = whole.index_select(0, rows.clamp(min=0))
        y = y + before.masked_fill((rows < 0)[:, None], 0.0) * weight[:, CONTEXT - j]
    return F.silu(y).to(x.dtype)


def prompt_tails(x, layout):
    """The last three rows of every prompt, [groups, channels, 3], the last row last, zeros before a shorter one: what
    `causal_conv_step` goes on from."""
    rows = layout.tails
    tails = x.detach().index_select(0, rows.clamp(min=0).view(-1)).view(*rows.shape, -1)
    return tails.masked_fill((rows < 0)[..., None], 0.0).transpose(1, 2).contiguous()


def causal_conv_step(tails, x, weight, samples, *, backend="auto"):
    """One row for each of R samples, whose tails it moves on in place.

    tails [samples, channels, 3], contiguous, of x's dtype: the rows before, as `prompt_tails` has them; samples int64
    [R]: whose, none of them twice; x [R, channels]; weight [channels, 4]. Returns [R, channels] of x's dtype. No
    gradient; nothing waits for the device, and a row depends on its own tail alone.
    """
    _check(x, weight)
    with torch.no_grad():
        return _reference_step(tails, x, weight, samples)


def _reference_step(tails, x, weight, samples):
    wide = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([tails.index_select(0, samples), x[..., None].to(tails.dtype)], -1)
    tails.index_copy_(0, samples, window[..., 1:])
    return F.silu((window.to(wide) * weight.to(wide)).sum(-1)).to(x.dtype)
