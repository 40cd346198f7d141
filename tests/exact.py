"""transformers' RMSNorm and vision rotary work in float32 inside. Made to keep their input's dtype, float64 comparisons
go through."""

import torch


def keep_dtype(set_attribute=setattr) -> None:
    """For both families; set_attribute(object, name, value) as monkeypatch has it, to be undone."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return tuple(x * cos + qwen2_5.rotate_half(x) * sin for x in (q, k))

    for module, kind in ((qwen2_5, qwen2_5.Qwen2_5_VLRMSNorm), (qwen3, qwen3.Qwen3VLTextRMSNorm)):
        set_attribute(kind, "forward", norm)
        set_attribute(module, "apply_rotary_pos_emb_vision", rotary)
