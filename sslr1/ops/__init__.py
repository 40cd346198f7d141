"""Tensor operations: they know tensors, not puzzles or models. One operation a file.

Attention loads on first use: it takes torch's compiler along, a second that puzzles need not wait for.
"""

from sslr1 import at_first_use
from sslr1.ops.chunks import float_logits
from sslr1.ops.elementwise import activated, gated_rms_norm, layer_norm, rms_norm, rotated, swiglu
from sslr1.ops.grpo_loss import GrpoLoss, advantages, grpo_loss, token_logprobs
from sslr1.ops.keys import fold, fold_tensor, generator, uniform
from sslr1.ops.lora import lora_linear
from sslr1.ops.patch_spec import PatchSpec
from sslr1.ops.products import fast_products
from sslr1.ops.render import choose_backend, patch_bytes, patches_of, render, render_patches, unpatchify
from sslr1.ops.sampling import sample

__getattr__, __all__ = at_first_use(
    __name__,
    {
        "attention": "Layout decode_attention shared_prefix_attention varlen_attention",
        "short_conv": "causal_conv causal_conv_step prompt_tails",
        "delta_rule": "gated_delta_rule gated_delta_step",
        "state_layout": "StateLayout",
        "decode_attend": "step_attention",
        "decode_delta": "step_delta",
        "decode_rows": "step_norm step_swiglu",
        "decode_samples": "step_begin step_end",
    },
)
__all__ += [
    "GrpoLoss",
    "PatchSpec",
    "activated",
    "advantages",
    "choose_backend",
    "fast_products",
    "float_logits",
    "fold",
    "fold_tensor",
    "gated_rms_norm",
    "generator",
    "grpo_loss",
    "layer_norm",
    "lora_linear",
    "patch_bytes",
    "patches_of",
    "render",
    "render_patches",
    "rms_norm",
    "rotated",
    "sample",
    "swiglu",
    "token_logprobs",
    "uniform",
    "unpatchify",
]
