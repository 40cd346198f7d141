"""Keys and values of a wave of groups: each prompt's once, each sample's own."""

import torch

from sslr1 import ops


class GroupCache:
    """P prompts x G samples in slots. A prompt's keys and values are written once and read by all its samples.

    Prompt buffers are [layers, P, H_kv, longest prompt, d], own buffers [layers, P, G, H_kv, max_tokens, d]; their bytes
    are fixed when the wave starts and shrink when finished groups are dropped.
    """

    def __init__(self, config, prompt_lengths, group_size, max_tokens, dtype, device):
        heads, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        d = getattr(config, "head_dim", None) or d
        P, L, layers = len(prompt_lengths), max(prompt_lengths), config.num_hidden_layers
        self.prompt_k, self.prompt_v = (torch.zeros(layers, P, heads, L, d, dtype=dtype, device=device) for _ in "kv")
        self.own_k, self.own_v = (
            torch.zeros(layers, P, group_size, heads, max_tokens, d, dtype=dtype, device=device) for _ in "kv"
        )
        self.prompt_lengths = list(prompt_lengths)
        lengths = torch.tensor(self.prompt_lengths, device=device)
        self.prompt_mask = torch.arange(L, device=device)[None] < lengths[:, None]
        self.filled = 0  # own tokens before the current step

    def write_prompts(self, layer, key, value):
        """key, value [1, H_kv, sum of prompt lengths, d], prompts one behind the other."""
        for buffer, packed in ((self.prompt_k, key), (self.prompt_v, value)):
            for place, part in enumerate(packed[0].split(self.prompt_lengths, 1)):
                buffer[layer, place, :, : part.shape[1]] = part

    def attend(self, layer, query, key, value, scale):
        """One decode step: query [1, H, P*G, d], key and value [1, H_kv, P*G, d] -> [1, P*G, H, d]."""
        P, G = self.own_k.shape[1:3]
        t = self.filled
        for buffer, new in ((self.own_k, key), (self.own_v, value)):
            buffer[layer, :, :, :, t] = new[0].transpose(0, 1).view(P, G, *buffer.shape[3:4], -1)
        out = ops.decode_attention(
            query[0].transpose(0, 1).reshape(P, G, query.shape[1], -1),
            self.prompt_k[layer],
            self.prompt_v[layer],
            self.prompt_mask,
            self.own_k[layer, :, :, :, : t + 1],
            self.own_v[layer, :, :, :, : t + 1],
            scale,
        )
        return out.reshape(1, P * G, query.shape[1], -1)

    def keep(self, prompts, samples):
        """Keep the prompts numbered `prompts` [P'] and of each the samples in `samples` [P', G']."""
        self.prompt_k, self.prompt_v = (x[:, prompts] for x in (self.prompt_k, self.prompt_v))
        self.prompt_mask = self.prompt_mask[prompts]
        rows = prompts[:, None].expand_as(samples)
        self.own_k, self.own_v = (x[:, rows, samples] for x in (self.own_k, self.own_v))
