"""Keys and values of the groups in flight: each prompt's once, each sample's own, in buffers that never move or
grow."""

from dataclasses import dataclass
from math import prod

import torch
from torch.nn import functional as F

from sslr1 import ops


def head_size(config) -> int:
    """Of a text model's configuration: what its keys and values are wide."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def bytes_a_token(config, itemsize) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * itemsize


def logit_bytes(config, rows) -> int:
    """Float32 logits of a step, and as much again while they are sampled from."""
    return 2 * 4 * rows * config.vocab_size


def places_for(prompts, group_size, wave_rows, wave_groups) -> int:
    """For how many groups there are buffers: `Engine` says what wave_rows and wave_groups are."""
    return min(prompts, wave_groups or max(1, wave_rows // group_size) * 3 // 2)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a rollout is: P places (groups in flight), the longest prompt's tokens, G samples a group, tokens a
    sample takes at most, and rows: samples that one step computes at most."""

    places: int
    longest: int
    group_size: int
    max_tokens: int
    rows: int

    @property
    def samples(self) -> int:
        return self.places * self.group_size

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens that there is room for: of prompts, and of samples' own."""
        return self.places * self.longest, self.samples * self.max_tokens

    def covers(self, other) -> bool:
        """Whether what has the other shape can run in buffers of this one."""
        return self.group_size == other.group_size and self.joined(other) == self

    def joined(self, other) -> "Shape":
        """The smallest that covers both, which have groups of one size."""
        pairs = {name: (n, getattr(other, name)) for name, n in vars(self).items()}
        return Shape(**{name: max(pair) for name, pair in pairs.items()})


class Storage:
    """Memory for keys and values of so many tokens of prompts and of samples' own, in which caches of several shapes
    take turns. Each of the two is (keys, values), flat."""

    def __init__(self, config, tokens, dtype, device):
        a_token = bytes_a_token(config, 1) // 2
        # Zeros: what lies beyond a length must be finite.
        self.prompts, self.own = (
            tuple(torch.zeros(n * a_token, dtype=dtype, device=device) for _ in range(2)) for n in tokens
        )
        self.tokens = tokens

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.prompts, *self.own))


class GroupCache:
    """P places of a prompt and its G samples. A prompt's keys and values are written once and read by all its samples.

    Prompt buffers are [layers, P, H_kv, longest prompt, d], own buffers [layers, P, G, H_kv, max_tokens, d]. A
    sample's number is p * G + s: its keys and values stay there for as long as it lives. How many there are of each
    lies on the device, so that a captured step serves every length. storage: a `Storage` that these buffers begin,
    whatever stands in it, as long as it is finite; their own unless given.
    """

    def __init__(self, config, shape, dtype, device, batch_invariant=False, storage=None):
        layers, heads, d = config.num_hidden_layers, config.num_key_value_heads, head_size(config)
        storage = storage or Storage(config, shape.tokens, dtype, device)
        prompt = layers, shape.places, heads, shape.longest, d
        own = layers, shape.places, shape.group_size, heads, shape.max_tokens, d
        self.prompt_k, self.prompt_v = (x[: prod(prompt)].view(prompt) for x in storage.prompts)
        self.own_k, self.own_v = (x[: prod(own)].view(own) for x in storage.own)
        self.prompt_lengths = torch.ones(shape.places, dtype=torch.int32, device=device)
        self.own_lengths = torch.zeros(shape.places, shape.group_size, dtype=torch.int32, device=device)
        self.heads = torch.arange(heads, device=device)
        self.batch_invariant = batch_invariant

    def expect(self, places, lengths):
        """The next prefill holds prompts of these lengths, for these places."""
        self.expected = list(zip(places, lengths))

    def write_prompts(self, layer, key, value):
        """key, value [1, H_kv, sum of prompt lengths, d], prompts one after the other."""
        for buffer, packed in ((self.prompt_k, key), (self.prompt_v, value)):
            parts = packed[0].split([length for _, length in self.expected], 1)
            for (place, length), part in zip(self.expected, parts):
                buffer[layer, place, :, :length] = part

    def begin_step(self, samples, written, first, last):
        """The next decode step computes `samples` [n], of which `written` [n] have so many keys already,
        all in places first to last - 1. n = (last - first) * G means all of these places' samples in order."""
        G, C = self.own_k.shape[2], self.own_k.shape[4]
        self.first, self.last = first, last
        self.samples = None if len(samples) == (last - first) * G else samples - first * G
        heads = len(self.heads)
        self.into = ((samples[:, None] * heads + self.heads) * C + written[:, None]).view(-1)

    def attend(self, layer, query, key, value, scale):
        """One decode step: query [1, H, R, d], key and value [1, H_kv, R, d] -> [1, R, H, d]. Rows after the n that
        `begin_step` named are padding."""
        rows, d = query.shape[2:]
        n = len(self.into) // len(self.heads)
        for buffer, new in ((self.own_k, key), (self.own_v, value)):
            buffer[layer].view(-1, d).index_copy_(0, self.into, new[0, :, :n].transpose(0, 1).reshape(-1, d))
        a, b, G = self.first, self.last, self.own_k.shape[2]
        q = query[0, :, :n].transpose(0, 1)
        if self.samples is not None:
            q = q.new_zeros((b - a) * G, *q.shape[1:]).index_copy_(0, self.samples, q)
        q = q.reshape(b - a, G, -1, d)
        prompts = self.prompt_k[layer, a:b], self.prompt_v[layer, a:b], self.prompt_lengths[a:b]
        own = self.own_k[layer, a:b], self.own_v[layer, a:b], self.own_lengths[a:b]
        out = ops.decode_attention(q, *prompts, *own, scale, batch_invariant=self.batch_invariant)
        out = out.view((b - a) * G, -1, d)
        if self.samples is not None:
            out = out.index_select(0, self.samples)
        if n < rows:
            out = F.pad(out, (0, 0, 0, 0, 0, rows - n))
        return out[None]
