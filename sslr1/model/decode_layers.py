"""A decode step through a language model's layers, by products and few operations between them, for all families alike:
what transformers' layers hold is read from outside, and its modules stay as they are.

A layer is: norm | product for q, k, v (or a linear layer's q, k, v, z, b, a) | attention (or convolution and delta
rule), up to the output's product | product, added to the residual in its own sum | norm | product for gate and up |
SwiGLU | product, added. Products of the same input are one where their weights lie one behind the other
(`joined`), as the sampler's replica has them; otherwise they are written side by side.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sslr1 import ops
from sslr1.model.lora import LoraLinear

# Linears of the same input, by the module that holds them, in the order in which their results lie side by side
TOGETHER = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "linear_attn": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    "mlp": ("gate_proj", "up_proj"),
}


def joined(network, names, dtypes, device) -> dict:
    """{name: empty tensor} of those of a model's parameters `names` that one product computes, in one memory for all
    that it takes: views, one behind the other. dtypes: {name: dtype}."""
    out, names = {}, set(names)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    for path, module in network.model.language_model.layers.named_modules(prefix="model.language_model.layers"):
        for leaf in ("weight", "bias"):
            together = [f"{path}.{name}.{leaf}" for name in TOGETHER.get(path.rsplit(".", 1)[-1], ())]
            if not together or not names.issuperset(together) or len({dtypes[name] for name in together}) > 1:
                continue
            if any(isinstance(getattr(module, name.split(".")[-2]), LoraLinear) for name in together):
                continue
            heights = [shapes[name][0] for name in together]
            buffer = torch.empty(sum(heights), *shapes[together[0]][1:], dtype=dtypes[together[0]], device=device)
            out |= dict(zip(together, buffer.split(heights)))
    return out


def _behind(tensors):
    """The one tensor that these make, where each begins where the one before ends; None elsewhere."""
    first, end = tensors[0], tensors[0].storage_offset()
    for x in tensors:
        same = x.untyped_storage()._cdata == first.untyped_storage()._cdata and x.dtype == first.dtype
        if not same or x.storage_offset() != end or not x.is_contiguous():
            return None
        end += x.numel()
    shape = sum(len(x) for x in tensors), *first.shape[1:]
    return first.as_strided(shape, first.stride())


class Product:
    """x [R, I] -> [R, sum of O] of linears with the same input, side by side."""

    def __init__(self, linears):
        self.linears, self.adapted = linears, any(isinstance(linear, LoraLinear) for linear in linears)
        self.weight = self.bias = None
        if not self.adapted:
            self.weight = _behind([linear.weight for linear in linears])
            if linears[0].bias is not None and self.weight is not None:
                self.bias = _behind([linear.bias for linear in linears])
                self.weight = self.weight if self.bias is not None else None
        self.sizes = [linear.out_features for linear in linears]

    def __call__(self, x):
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        if self.adapted:
            return torch.cat([linear(x) for linear in self.linears], -1)
        out = x.new_empty(len(x), sum(self.sizes))
        for linear, part in zip(self.linears, out.split(self.sizes, -1)):
            if linear.bias is None:
                torch.mm(x, linear.weight.t(), out=part)
            else:
                torch.addmm(linear.bias, x, linear.weight.t(), out=part)
        return out


def add_product(x, y, linear):
    """x += linear(y), in place."""
    if linear.bias is not None or isinstance(linear, LoraLinear):
        x += linear(y)
    else:
        x.addmm_(y, linear.weight.t())


@dataclass
class Norm:
    weight: torch.Tensor
    eps: float
    zero_centred: bool  # times 1 + weight

    @classmethod
    def of(cls, module):
        if hasattr(module, "variance_epsilon"):
            return cls(module.weight, module.variance_epsilon, False)
        return cls(module.weight, module.eps, True)

    def __call__(self, x):
        return ops.step_norm(x, self.weight, self.eps, zero_centred=self.zero_centred)


class Layer:
    def __init__(self, layer, text):
        self.before, self.behind = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        self.linear = hasattr(layer, "linear_attn")
        kind = "linear_attn" if self.linear else "self_attn"
        self.mixer = getattr(layer, kind)
        self.number = self.mixer.layer_idx
        self.into, self.up = (
            Product([getattr(part, name) for name in TOGETHER[key]])
            for part, key in ((self.mixer, kind), (layer.mlp, "mlp"))
        )
        self.out, self.down = self.mixer.out_proj if self.linear else self.mixer.o_proj, layer.mlp.down_proj
        if self.linear:
            return
        norms = [Norm.of(getattr(self.mixer, name)) for name in ("q_norm", "k_norm") if hasattr(self.mixer, name)]
        self.options = dict(heads=text.num_attention_heads)
        self.options["gated"] = self.mixer.q_proj.out_features > text.num_attention_heads * self.mixer.head_dim
        self.norms = [norm.weight for norm in norms] or [None, None]
        if norms:
            self.options |= dict(eps=norms[0].eps, zero_centred=norms[0].zero_centred)

    def mix(self, x, cos, sin, cache):
        rows = self.into(x)
        if not self.linear:
            return cache.attend(self.number, rows, cos, sin, *self.norms, self.mixer.scaling, **self.options)
        m = self.mixer
        given = m.conv1d.weight[:, 0], m.A_log, m.dt_bias, m.norm.weight
        return cache.recur(self.number, rows, *given, m.norm.variance_epsilon)

    def __call__(self, x, cos, sin, cache):
        """x [R, D], the residual, moves on in place."""
        add_product(x, self.mix(self.before(x), cos, sin, cache), self.out)
        add_product(x, ops.step_swiglu(self.up(self.behind(x))), self.down)


class DecodeLayers:
    """A language model's layers as they lie now: parameters that are replaced later are not seen."""

    def __init__(self, language):
        text = language.config
        if text.hidden_act != "silu":
            raise ValueError(f"hidden_act is {text.hidden_act!r}: a decode step knows silu only")
        self.embed_tokens, self.norm = language.embed_tokens, Norm.of(language.norm)
        self.layers = [Layer(layer, text) for layer in language.layers]

    def __call__(self, tokens, positions, tables, cache):
        """tokens, positions int64 [R] -> final states [R, D]. tables: `rotary_tables`; cache: a `GroupCache` behind
        `begin_step`."""
        x = self.embed_tokens(tokens)
        cos, sin = (table.index_select(0, positions) for table in tables)
        for layer in self.layers:
            layer(x, cos, sin, cache)
        return self.norm(x)


def rotary_tables(language, positions, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, rotary] of text at each position, as the model's module has them: looked up, they take
    two kernels of a step, computed a dozen. Raises ValueError for a rotary embedding that depends on the length."""
    kind = language.rotary_emb.rope_type
    if "dynamic" in kind or kind == "longrope":
        raise ValueError(f"rope_type is {kind!r}: a decode step knows those only that don't depend on the length")
    at = torch.arange(positions, device=device).expand(3, 1, -1)
    like = torch.empty(1, dtype=language.embed_tokens.weight.dtype, device=device)
    cos, sin = language.rotary_emb(like, at)
    return cos[0].contiguous(), sin[0].contiguous()
