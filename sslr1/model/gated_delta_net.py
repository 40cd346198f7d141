"""Linear attention of Qwen3.5 (gated delta net, arXiv 2412.06464) in packed groups: transformers' own modules, whose
forward is replaced where a `layout` says who sees whom. Decode steps are decode_layers.py's.

A prompt's layers are computed once: its completions start from the state that it ends in, and from its last rows where
the convolution looks back.
"""

from types import MethodType

import torch
from torch.nn import functional as F

from sslr1 import ops

# Float32 in bfloat16 checkpoints, and what they compute with: rounded, they are another model
KEPT = ("linear_attn.A_log", "linear_attn.norm.weight")


def dtypes_of(network, dtype) -> dict:
    """{name: dtype} of a model's parameters where it computes in `dtype`: what is KEPT is float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return {name: wide if name.endswith(KEPT) else dtype for name, _ in network.named_parameters()}


def cast(network, dtype) -> None:
    """Parameters to the dtypes that `dtypes_of` gives, and not the rotary tables, which stay float32."""
    dtypes = dtypes_of(network, dtype)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def linear_layers(config) -> list[int]:
    """Which layers of a text model keep a state in place of keys and values. None of them in a model of attention
    alone."""
    kinds = getattr(config, "layer_types", None) or []
    return [number for number, kind in enumerate(kinds) if kind == "linear_attention"]


def state_size(config) -> int:
    """Numbers of one sequence's state in one linear layer."""
    return config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim


def channels(config) -> int:
    """Of the convolution: queries, keys and values of all heads."""
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return keys + config.linear_num_value_heads * config.linear_value_head_dim


def plug_in(language) -> bool:
    """Let a language model's linear layers take packed rows; whether it has any."""
    layers = [language.layers[number].linear_attn for number in linear_layers(language.config)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return bool(layers)


def _forward(self, hidden_states, *arguments, layout=None, state_layout=None, group_cache=None, **options):
    """Packed groups when `state_layout` is given (and their prompts' last states go to `group_cache` if there is one),
    and otherwise transformers' own forward."""
    if state_layout is None:
        return type(self).forward(self, hidden_states, *arguments, **options)
    x = hidden_states[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed, z = self.in_proj_qkv(x), self.in_proj_z(x)
    g = -self.A_log.to(wide).exp() * F.softplus(self.in_proj_a(x).to(wide) + self.dt_bias.to(x.dtype))
    beta = self.in_proj_b(x).sigmoid()
    out = _mix(self, mixed, self.conv1d.weight[:, 0].to(x.dtype), g, beta, state_layout, group_cache)
    out = self.norm(out.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
    return self.out_proj(out.view(1, len(x), -1))


@torch.compiler.disable  # or every layout would be compiled for
def _mix(self, mixed, weight, g, beta, state_layout, group_cache):
    """[R, H_v, d_v]: convolution and rule. mixed [R, channels]: queries, keys, values; weight [channels, taps]; g and
    beta [R, H_v]."""
    q, k, v = _heads(self, ops.causal_conv(mixed, weight, state_layout))
    if group_cache is None:
        return ops.gated_delta_rule(q, k, v, g, beta, state_layout)
    out, states = ops.gated_delta_rule(q, k, v, g, beta, state_layout, return_states=True)
    group_cache.write_states(self.layer_idx, states, ops.prompt_tails(mixed, state_layout))
    return out


def _heads(self, mixed):
    """Queries and keys [R, H_k, d_k], values [R, H_v, d_v]."""
    q, k, v = mixed.split((self.key_dim, self.key_dim, self.value_dim), -1)
    q, k = (x.unflatten(-1, (-1, self.head_k_dim)) for x in (q, k))
    return q, k, v.unflatten(-1, (-1, self.head_v_dim))
