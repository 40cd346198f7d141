"""Keys and values of the groups in flight, each prompt's once and each sample's own, and what linear layers keep in
their place: in buffers that never move or grow."""

from dataclasses import dataclass
from math import prod

import torch

from sslr1 import ops
from sslr1.model.gated_delta_net import channels, linear_layers


def head_size(config) -> int:
    """Of a text model's configuration: what its keys and values are wide."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def full_layers(config) -> list:
    """The layers that keep keys and values."""
    linear = set(linear_layers(config))
    return [number for number in range(config.num_hidden_layers) if number not in linear]


def bytes_a_token(config, itemsize) -> int:
    """Keys and values of one token in all layers that keep them."""
    return 2 * len(full_layers(config)) * config.num_key_value_heads * head_size(config) * itemsize


def of_a_sample(config) -> tuple:
    """Shapes of what a linear layer keeps of a sample: its state, and the rows that its convolution looks back to.
    Nothing in a model that has none."""
    if not linear_layers(config):
        return (0,), (0,)
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    return (config.linear_num_value_heads, keys, values), (channels(config), config.linear_conv_kernel_dim - 1)


def bytes_a_sample(config, itemsize) -> int:
    """A sample's states, float32 at least, and last rows in all linear layers, whatever its length."""
    state, tail = map(prod, of_a_sample(config))
    return len(linear_layers(config)) * (state * max(itemsize, 4) + tail * itemsize)


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
    def extent(self) -> tuple[int, int, int]:
        """What there is room for: tokens of prompts, samples' own tokens, samples."""
        return self.places * self.longest, self.samples * self.max_tokens, self.samples

    def covers(self, other) -> bool:
        """Whether what has the other shape can run in buffers of this one."""
        return self.group_size == other.group_size and self.joined(other) == self

    def joined(self, other) -> "Shape":
        """The smallest that covers both, which have groups of one size."""
        pairs = {name: (n, getattr(other, name)) for name, n in vars(self).items()}
        return Shape(**{name: max(pair) for name, pair in pairs.items()})


class Storage:
    """Memory for what `Shape.extent` names, in which caches of several shapes take turns, flat: `prompts` and `own`,
    (keys, values) each, and `linear`, (states, the convolutions' last rows) of samples."""

    def __init__(self, config, extent, dtype, device):
        *tokens, samples = extent
        a_token = bytes_a_token(config, 1) // 2
        # Zeros: what lies beyond a length must be finite.
        self.prompts, self.own = (
            tuple(torch.zeros(n * a_token, dtype=dtype, device=device) for _ in range(2)) for n in tokens
        )
        sizes = [samples * len(linear_layers(config)) * prod(shape) for shape in of_a_sample(config)]
        dtypes = torch.promote_types(dtype, torch.float32), dtype
        self.linear = tuple(torch.zeros(n, dtype=kind, device=device) for n, kind in zip(sizes, dtypes))
        self.extent = extent

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.prompts, *self.own, *self.linear))


class GroupCache:
    """P places of a prompt and its G samples. A prompt's keys and values are written once and read by all its samples.

    Prompt buffers are [layers, P, H_kv, longest prompt, d], own buffers [layers, P, G, H_kv, max_tokens, d]. A
    sample's number is p * G + s: its keys and values stay there for as long as it lives. How many there are of each
    lies on the device, so that a captured step serves every length.

    Of linear layers every sample has, by its number, a state [H_v, d_k, d_v] in float32 or wider and the rows that the
    convolution looks back to, [channels, taps - 1]. A group's begin as its prompt's last.

    storage: a `Storage` that these buffers begin, whatever stands in it, as long as it is finite; their own unless
    given.
    """

    def __init__(self, config, shape, dtype, device, batch_invariant=False, storage=None):
        full, linear = full_layers(config), linear_layers(config)
        layers, heads, d = len(full), config.num_key_value_heads, head_size(config)
        self.number = {layer: i for kind in (full, linear) for i, layer in enumerate(kind)}  # of a layer among its kind
        storage = storage or Storage(config, shape.extent, dtype, device)
        prompt = layers, shape.places, heads, shape.longest, d
        own = layers, shape.places, shape.group_size, heads, shape.max_tokens, d
        self.prompt_k, self.prompt_v = (x[: prod(prompt)].view(prompt) for x in storage.prompts)
        self.own_k, self.own_v = (x[: prod(own)].view(own) for x in storage.own)
        self.prompt_lengths = torch.ones(shape.places, dtype=torch.int32, device=device)
        self.own_lengths = torch.zeros(shape.places, shape.group_size, dtype=torch.int32, device=device)
        self.batch_invariant = batch_invariant
        of = ((len(linear), shape.samples, *size) for size in of_a_sample(config))
        self.states, self.tails = (x[: prod(size)].view(size) for x, size in zip(storage.linear, of))

    def expect(self, places, lengths):
        """The next prefill holds prompts of these lengths, for these places."""
        self.expected = list(zip(places, lengths))

    def write_prompts(self, layer, key, value):
        """key, value [1, H_kv, sum of prompt lengths, d], prompts one after the other."""
        for buffer, packed in ((self.prompt_k, key), (self.prompt_v, value)):
            parts = packed[0].split([length for _, length in self.expected], 1)
            for (place, length), part in zip(self.expected, parts):
                buffer[self.number[layer], place, :, :length] = part

    def write_states(self, layer, states, tails):
        """Of a linear layer: states [prompts, H_v, d_k, d_v] and the convolution's last rows [prompts, channels, taps -
        1] after each prompt. All samples of a group begin with them."""
        G, i = self.own_k.shape[2], self.number[layer]
        for (place, _), state, tail in zip(self.expected, states, tails):
            mine = slice(place * G, (place + 1) * G)
            self.states[i, mine], self.tails[i, mine] = state, tail

    def begin_step(self, samples, written, first, last):
        """The next decode step computes `samples` [n], of which `written` [n] have so many keys already,
        all in places first to last - 1. n = (last - first) * G means all of these places' samples in order."""
        self.first, self.last, self.decoded, self.written = first, last, samples, written
        self.among = samples - first * self.own_k.shape[2] if first else samples

    def recur(self, layer, rows, weight, A_log, dt_bias, norm, eps):
        """One decode step of a linear layer, as `ops.step_delta` has it."""
        i = self.number[layer]
        held = self.states[i], self.tails[i], self.decoded
        return ops.step_delta(rows, weight, A_log, dt_bias, norm, *held, eps=eps)

    def attend(self, layer, qkv, cos, sin, q_norm, k_norm, scale, **options):
        """One decode step of a layer that attends, as `ops.step_attention` has it."""
        i, places = self.number[layer], slice(self.first, self.last)
        prompts = self.prompt_k[i, places], self.prompt_v[i, places], self.prompt_lengths[places]
        own = self.own_k[i, places], self.own_v[i, places], self.own_lengths[places]
        given = cos, sin, q_norm, k_norm, *prompts, *own, self.among, self.written, scale
        return ops.step_attention(qkv, *given, batch_invariant=self.batch_invariant, **options)
