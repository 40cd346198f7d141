"""transformers' RMSNorm, vision rotary and gated delta rule work in float32 inside. Made to keep their input's dtype,
float64 comparisons go through."""

import torch
from torch.overrides import TorchFunctionMode


def keep_dtype(set_attribute=setattr) -> None:
    """For all families; set_attribute(object, name, value) as monkeypatch has it, to be undone."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return tuple(x * cos + qwen2_5.rotate_half(x) * sin for x in (q, k))

    def wide(forward):
        def inner(*arguments, **options):
            with Wide():
                return forward(*arguments, **options)

        return inner

    for module, kind in ((qwen2_5, qwen2_5.Qwen2_5_VLRMSNorm), (qwen3, qwen3.Qwen3VLTextRMSNorm)):
        set_attribute(kind, "forward", norm)
        set_attribute(module, "apply_rotary_pos_emb_vision", rotary)
    set_attribute(qwen3_5, "apply_rotary_pos_emb_vision", rotary)
    for kind in (qwen3_5.Qwen3_5RMSNorm, qwen3_5.Qwen3_5RMSNormGated, qwen3_5.Qwen3_5GatedDeltaNet):
        set_attribute(kind, "forward", wide(kind.forward))


class Wide(TorchFunctionMode):
    """Inside, what is float64 stays so where a module's code says float32."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function in (torch.Tensor.float, torch.Tensor.to) and arguments[0].dtype == torch.float64:
            if function == torch.Tensor.float:
                return arguments[0]
            arguments = [torch.float64 if x is torch.float32 else x for x in arguments]
        return function(*arguments, **options)
