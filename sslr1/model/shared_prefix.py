"""The policy's forward over packed groups: transformers' own modules, with our attention plugged into its registry.

Cost of a group in one decoder layer: P + sum C tokens through the matrices, where G padded sequences would take
G * (P + C); attention reads the prompt's keys and values once.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sslr1 import ops

TEXT_ATTENTION = "sslr1_shared_prefix"
VISION_ATTENTION = "sslr1_flash_varlen"  # transformers hands cumulative lengths only to names that contain "flash"


def _text_attention(module, query, key, value, attention_mask, *, scaling, layout=None, cache=None, **kwargs):
    """Packed groups when `layout` is given (and their keys and values go to `cache` if there is one), a decode step when
    only `cache` is, and otherwise transformers' own SDPA, so that the model stays usable as any other."""
    if layout is not None:
        if cache is not None:
            cache.write_prompts(module.layer_idx, key, value)
        return ops.shared_prefix_attention(query, key, value, layout, scaling), None
    if cache is not None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _vision_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    return ops.varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling), None


AttentionInterface.register(TEXT_ATTENTION, _text_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)


def plug_in(model) -> None:
    """Let a loaded model use our attention. Set behind transformers' setter, which would look a name with "flash" up on a
    hub of kernels."""
    model.model.language_model.config._attn_implementation_internal = TEXT_ATTENTION
    model.model.visual.config._attn_implementation_internal = VISION_ATTENTION


def no_mask(embeds) -> torch.Tensor:
    """What to give a language model as its mask when `layout` or `cache` says who sees whom: every family takes a tensor of
    four dimensions for a finished mask and hands it to the attention, which looks at it no more."""
    return embeds.new_empty(1, 1, 1, 0)


def run(model, packed, cache=None) -> torch.Tensor:
    """Final hidden states [T, D] of a packed micro-batch; with `cache`, prompts' keys and values are written to it."""
    language = model.model.language_model
    embeds = language.embed_tokens(packed.input_ids)
    pixels = packed.pixel_values.to(embeds.dtype)
    seen = model.model.visual(pixels, grid_thw=packed.image_grid_thw.to(pixels.device))
    is_image = packed.input_ids == model.config.image_token_id
    places, images = is_image.nonzero()[:, 0], seen.pooler_output
    if len(places) != len(images):
        raise ValueError(f"{len(places)} image placeholders for {len(images)} visual tokens")
    embeds = embeds.index_copy(0, places, images.to(embeds.dtype))
    return language(
        inputs_embeds=embeds[None],
        position_ids=packed.position_ids[:, None],
        attention_mask=no_mask(embeds),
        use_cache=False,
        layout=packed.layout,
        cache=cache,
        **deepstack(seen, is_image),
    ).last_hidden_state[0]


def deepstack(seen, is_image) -> dict:
    """Arguments by which a language model adds what its vision tower says of earlier blocks (DeepStack, arXiv 2406.04334) to
    image tokens behind its first layers. None for a tower that gives its last block only.

    seen: the tower's output; is_image bool [T].
    """
    features = getattr(seen, "deepstack_features", None)
    return {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": features} if features else {}


class Policy(nn.Module):
    """The model as the learner sees it: packed groups in, whatever `loss` makes of their predicting states out.

    The loss runs inside this module's forward, where a sharded head is whole.
    """

    def __init__(self, model):
        super().__init__()
        plug_in(model)
        self.model = model

    @property
    def pack_options(self) -> dict:
        config = self.model.config
        return {"image_token_id": config.image_token_id, "merge": config.vision_config.spatial_merge_size}

    def forward(self, packed, loss):
        """loss(hidden [N, D], lm_head [V, D]) -> tuple of tensors."""
        hidden = run(self.model, packed).index_select(0, packed.predictors)
        return loss(hidden, self.model.lm_head.weight)
