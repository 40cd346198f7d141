"""transformers' own layers, in which norms, activations and the vision tower's rotary embedding keep their inputs alone
for the backward pass, and the products that read them the same (`ops.again`).

Applied from outside to a model that is trained: modules are known by what they hold, which is the same in all families.
Without gradients, and where torch.compile decides what is kept, each runs its own forward.
"""

from types import MethodType

from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sslr1 import ops
from sslr1.ops import again

SILU = nn.SiLU, type(ACT2FN["silu"])


def plug_in(network) -> None:
    """Replace the forwards of a model's modules, before it is sharded."""
    for tower in (network.model.language_model, network.model.visual):
        for module in tower.modules():
            forward = _lean(module)
            if forward:
                module.forward = MethodType(_where_it_is_trained(forward), module)


def _lean(module):
    """A module's lean forward, None where it has none."""
    parts, kind = dict(module.named_children()), type(module)
    if kind is nn.Linear:
        return _linear
    if kind is nn.LayerNorm:
        return _layer_norm
    if kind.__name__.endswith("RMSNormGated"):
        return _gated_norm
    if kind.__name__.endswith("RMSNorm"):
        return _rms_norm if hasattr(module, "variance_epsilon") else _centred_norm
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(parts) and isinstance(module.act_fn, SILU):
        return _swiglu
    if list(parts) == ["linear_fc1", "linear_fc2", "act_fn"]:
        return _mlp
    if list(parts) == ["qkv", "proj"]:
        return _vision_attention
    return None


def _where_it_is_trained(forward):
    def chosen(self, *arguments, **options):
        run = type(self).forward if again.is_plain() else forward
        return run(self, *arguments, **options)

    return chosen


def _linear(self, x):
    return again.linear(x, self.weight, self.bias)


def _layer_norm(self, x):
    return ops.layer_norm(x, self.weight, self.bias, self.eps)


def _rms_norm(self, x):
    return ops.rms_norm(x, self.weight, self.variance_epsilon)


def _centred_norm(self, x):
    return ops.rms_norm(x, self.weight, self.eps, plus_one=True)


def _gated_norm(self, x, gate):
    return ops.gated_rms_norm(x, gate, self.weight, self.variance_epsilon)


def _swiglu(self, x):
    return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def _mlp(self, x):
    return self.linear_fc2(ops.activated(self.act_fn, self.linear_fc1(x)))


def _vision_attention(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen=None, **kwargs):
    """For variable-length attention, which takes all sequences at once; others run the module's own."""
    name = self.config._attn_implementation
    if "flash" not in name:
        rest = dict(position_embeddings=position_embeddings, max_seqlen=max_seqlen, **kwargs)
        return type(self).forward(self, hidden_states, cu_seqlens, **rest)
    qkv = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
    q, k, v = (x.transpose(0, 1)[None] for x in ops.rotated(qkv, *position_embeddings))
    out, _ = ALL_ATTENTION_FUNCTIONS[name](
        self,
        q,
        k,
        v,
        attention_mask=None,
        scaling=self.scaling,
        cu_seq_lens_q=cu_seqlens,
        max_length_q=max_seqlen,
        **kwargs,
    )
    return self.proj(out.reshape(len(hidden_states), -1))
