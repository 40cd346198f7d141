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
        self.packed_lengths = list(prompt_lengths)  # as `write_prompts` gets them, before any prompt is dropped
        self.prompt_lengths = torch.tensor(self.packed_lengths, dtype=torch.int32, device=device)
        # Where this step's key goes, and how many there are with it: on the device, so that a captured step can be replayed.
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.own_lengths = torch.ones(1, dtype=torch.int32, device=device)

    def advance(self):
        """The step is over in all layers; the next one writes behind it."""
        self.place += 1
        self.own_lengths += 1

    def write_prompts(self, layer, key, value):
        """key, value [1, H_kv, sum of prompt lengths, d], prompts one behind the other."""
        for buffer, packed in ((self.prompt_k, key), (self.prompt_v, value)):
            for place, part in enumerate(packed[0].split(self.packed_lengths, 1)):
                buffer[layer, place, :, : part.shape[1]] = part

    def attend(self, layer, query, key, value, scale):
        """One decode step: query [1, H, P*G, d], key and value [1, H_kv, P*G, d] -> [1, P*G, H, d]."""
        P, G = self.own_k.shape[1:3]
        for buffer, new in ((self.own_k, key), (self.own_v, value)):
            buffer[layer].index_copy_(3, self.place, new[0].transpose(0, 1).view(P, G, buffer.shape[3], 1, -1))
        out = ops.decode_attention(
            query[0].transpose(0, 1).reshape(P, G, query.shape[1], -1),
            self.prompt_k[layer],
            self.prompt_v[layer],
            self.prompt_lengths,
            self.own_k[layer],
            self.own_v[layer],
            self.own_lengths,
            scale,
        )
        return out.reshape(1, P * G, query.shape[1], -1)

    def keep(self, prompts, samples):
        """Keep the prompts numbered `prompts` [P'] and of each the samples in `samples` [P', G']."""
        self.prompt_k, self.prompt_v = (x[:, prompts] for x in (self.prompt_k, self.prompt_v))
        self.prompt_lengths = self.prompt_lengths[prompts]
        rows = prompts[:, None].expand_as(samples)
        self.own_k, self.own_v = (x[:, rows, samples] for x in (self.own_k, self.own_v))
