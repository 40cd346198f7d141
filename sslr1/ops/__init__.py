"""Tensor operations: they know tensors, not puzzles or models. One operation a file."""

from sslr1.ops.attention import Layout, decode_attention, shared_prefix_attention, varlen_attention
from sslr1.ops.chunks import float_logits
from sslr1.ops.grpo_loss import GrpoLoss, advantages, grpo_loss, token_logprobs
from sslr1.ops.keys import fold, fold_tensor, generator, uniform
from sslr1.ops.patch_spec import PatchSpec
from sslr1.ops.render import choose_backend, render, render_patches, unpatchify
from sslr1.ops.sampling import sample

__all__ = [
    "GrpoLoss",
    "Layout",
    "PatchSpec",
    "advantages",
    "choose_backend",
    "decode_attention",
    "float_logits",
    "fold",
    "fold_tensor",
    "generator",
    "grpo_loss",
    "render",
    "render_patches",
    "sample",
    "shared_prefix_attention",
    "token_logprobs",
    "uniform",
    "unpatchify",
    "varlen_attention",
]
