"""The policy's forward over packed groups: transformers' own modules, with our attention plugged into its registry.

Cost of a group in one decoder layer: P + sum C tokens through the matrices, where G padded sequences would take
G * (P + C); attention reads the prompt's keys and values once.
"""

from itertools import accumulate
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, vision_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sslr1 import ops
from sslr1.model import gated_delta_net, lean_layers
from sslr1.model.packing import pack_options
from sslr1.ops import transfer

TEXT_ATTENTION = "sslr1_shared_prefix"
VISION_ATTENTION = "sslr1_flash_varlen"  # transformers hands cumulative lengths only to names that contain "flash"


@torch.compiler.disable  # or every layout would be compiled for
def _text_attention(module, query, key, value, attention_mask, *, scaling, layout=None, group_cache=None, **kwargs):
    """Packed groups when `layout` is given (and their keys and values go to `group_cache` if there is one), and
    otherwise transformers' own SDPA, so that the model stays usable as any other."""
    if layout is not None:
        if group_cache is not None:
            group_cache.write_prompts(module.layer_idx, key, value)
        return ops.shared_prefix_attention(query, key, value, layout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@torch.compiler.disable
def _vision_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    return ops.varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling), None


AttentionInterface.register(TEXT_ATTENTION, _text_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)


def plug_in(model) -> None:
    """Let a loaded model use our attention. Set past transformers' setter, which would look a name with "flash" up on
    a hub of kernels."""
    model.model.language_model.config._attn_implementation_internal = TEXT_ATTENTION
    model.model.visual.config._attn_implementation_internal = VISION_ATTENTION
    gated_delta_net.plug_in(model.model.language_model)
    embed = model.model.visual.patch_embed.proj
    embed.forward = MethodType(_whole_patches, embed)
    if hasattr(model.model.language_model, "_deepstack_process"):
        model.model.language_model._deepstack_process = _add_to_rows


def _whole_patches(convolution, patches):
    """What a convolution makes of patches [n, …] of its kernel's size, [n, D]: one product, which no library of
    convolutions has to look at."""
    return F.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def no_mask(embeds) -> torch.Tensor:
    """What to give a language model as its mask when `layout` says who sees whom: every family takes a
    tensor of four dimensions for a finished mask and hands it to the attention, which looks at it no more."""
    return embeds.new_empty(1, 1, 1, 0)


def run(model, packed, cache=None) -> torch.Tensor:
    """Final hidden states [T, D] of a packed micro-batch; with `cache`, prompts' keys and values are written to it.

    Nothing in it waits for the device: what must be counted is counted in `pack` or from `image_grid_thw`, on the CPU.
    """
    language = model.model.language_model
    embeds = language.embed_tokens(packed.input_ids)
    rows, (images, *earlier) = packed.image_rows, see(model.model.visual, packed.prompts, packed.image_grid_thw, embeds)
    if len(rows) != len(images):
        raise ValueError(f"{len(rows)} image placeholders for {len(images)} visual tokens")
    embeds = embeds.index_copy(0, rows, images.to(embeds.dtype))
    return language(
        inputs_embeds=embeds[None],
        position_ids=packed.position_ids[:, None],
        attention_mask=no_mask(embeds),
        use_cache=False,
        layout=packed.layout,
        state_layout=packed.state_layout,
        group_cache=cache,
        **deepstack(earlier, rows),
    ).last_hidden_state[0]


def see(visual, prompts, grid_thw, like) -> tuple:
    """(visual tokens [n, D], features of earlier blocks [n, D] …) of prompts' images, in order: what they have kept, or
    what the vision tower makes of them. grid_thw: of them all, on the CPU; like: a tensor of its device and dtype."""
    if all(prompt.seen is not None for prompt in prompts):
        return tuple(torch.cat(parts) for parts in zip(*(prompt.seen for prompt in prompts)))
    with torch.inference_mode(False):  # or what is kept from the rollout could not be trained on
        for prompt in prompts:
            prompt.pixel_values = transfer.upload(prompt.pixel_values, like.device, "patches")
            prompt.tables = prompt.tables or vision_tables(visual, prompt.image_grid_thw, like.device)
    pixels = torch.cat([prompt.pixel_values for prompt in prompts]).to(like.dtype)
    seen = visual(pixels, grid_thw=grid_thw, **joined([prompt.tables for prompt in prompts]))
    return seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())


def trains_tower(model) -> bool:
    """Whether anything of a model's vision tower is trained, adapters included."""
    return any(p.requires_grad for p in model.model.visual.parameters())


def keep_seen(model, prompts) -> None:
    """Let prompts keep what a model's vision tower makes of their images, for one that is frozen: from then on none
    looks at them again. Costs a visual token D numbers, and as many for each earlier block that it tells of."""
    new = [prompt for prompt in prompts if prompt.seen is None]
    if not new:
        return
    counts = [int(p.image_grid_thw.prod(1).sum()) // model.config.vision_config.spatial_merge_size**2 for p in new]
    grid_thw = torch.cat([prompt.image_grid_thw for prompt in new])
    with torch.inference_mode(False), torch.no_grad():
        found = see(model.model.visual, new, grid_thw, model.lm_head.weight)
    for prompt, *own in zip(new, *(x.split(counts) for x in found)):
        prompt.seen = tuple(own)


def joined(tables) -> dict:
    """`vision_tables` of several prompts' images from those of each one's, where those lie."""
    if len(tables) == 1:
        return tables[0]
    out = {}
    for name, first in tables[0].items():
        own = [table[name] for table in tables]
        if name.startswith("max_"):
            out[name] = max(own)
        elif name.startswith("cu_"):
            ends = accumulate(len(table["position_ids"]) for table in tables)  # patches
            out[name] = torch.cat([first, *(x[1:] + end for x, end in zip(own[1:], ends))])
        elif name == "window_index":
            ends = accumulate(len(x) for x in own)
            out[name] = torch.cat([first, *(x + end for x, end in zip(own[1:], ends))])
        else:
            out[name] = torch.cat(own)
    return out


def vision_tables(visual, grid_thw, device) -> dict:
    """What a vision tower derives from its images' sizes (int64 [M, 3] on the CPU), by transformers' own functions:
    places, windows (Qwen2.5-VL) or how to stretch the learned positions (Qwen3-VL), each sequence's boundaries, the
    longest's length."""
    merge, boundaries = visual.spatial_merge_size, vision_utils.get_vision_cu_seqlens(grid_thw)
    tables = {"cu_seqlens": boundaries, "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge)}
    longest = {"max_seqlen": boundaries}
    if hasattr(visual, "window_size"):
        tables["window_index"], windows = vision_utils.get_vision_window_index(
            grid_thw, merge, visual.window_size, visual.patch_size
        )
        tables["cu_window_seqlens"] = longest["max_window_seqlen"] = windows
    if hasattr(visual, "num_grid_per_side"):
        tables["interp_indices"], tables["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            visual.num_grid_per_side,
            visual.interpolation_mode,
            visual.interpolation_align_corners,
            merge,
        )
    moved = dict(zip(tables, transfer.upload_together(tables.values(), device, "tables")))
    return moved | {name: int(x.diff().max()) for name, x in longest.items()}


def deepstack(features, rows) -> dict:
    """Arguments by which a language model adds what its vision tower says of earlier blocks (DeepStack, arXiv
    2406.04334) to image tokens after its first layers. None for a tower that gives its last block only.

    features: the tower's of those; rows int64: the image tokens', which `_add_to_rows` takes in place of a mask.
    """
    return {"visual_pos_masks": rows, "deepstack_visual_embeds": features} if features else {}


def _add_to_rows(hidden_states, rows, features):
    """`_deepstack_process` of transformers' Qwen3-VL, which takes a mask, and waits for the device to count it, a
    layer."""
    if rows.dtype == torch.bool:
        rows = rows.flatten().nonzero()[:, 0]
    flat = hidden_states.flatten(0, 1).index_add(0, rows, features.to(hidden_states.dtype))
    return flat.view_as(hidden_states)


class Policy(nn.Module):
    """The model as the learner sees it: packed groups in, whatever `loss` makes of their predicting states out.

    The loss runs inside this module's forward, where a sharded head is whole.
    """

    def __init__(self, model):
        super().__init__()
        plug_in(model)
        lean_layers.plug_in(model)
        self.model = model

    @property
    def pack_options(self) -> dict:
        return pack_options(self.model.config)

    def forward(self, packed, loss):
        """loss(hidden [N, D], lm_head [V, D]) -> tuple of tensors."""
        hidden = run(self.model, packed).index_select(0, packed.predictors)
        return loss(hidden, self.model.lm_head.weight)
