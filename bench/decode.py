"""One decode step's attention at the 3B model's shape: the kernel against plain SDPA on keys and values repeated for
each sample.

Both sides run several layers, each with a cache of its own, as one captured graph: their times hold no launch from
Python and find nothing in the chip's cache that a real step wouldn't.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from row import Row, Sides, device_of

from sslr1 import ops


@dataclass(frozen=True)
class Shape:
    samples: int = 512
    G: int = 16
    H: int = 16
    H_kv: int = 2
    d: int = 128
    prompt: int = 1000
    own: int = 200
    layers: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self):
        return self.d**-0.5


SMALL = Shape(samples=8, G=4, H=4, d=32, prompt=50, own=9, layers=2)


def draw(shape, device):
    """Arguments of `ops.decode_attention`."""
    P, heads = shape.samples // shape.G, (shape.H_kv,)
    options = dict(device=device, dtype=shape.dtype)
    q = torch.randn(P, shape.G, shape.H, shape.d, **options)
    prompt_k, prompt_v = torch.randn(2, P, *heads, shape.prompt, shape.d, **options)
    own_k, own_v = torch.randn(2, P, shape.G, *heads, shape.own, shape.d, **options)
    prompt_lengths = torch.full((P,), shape.prompt, dtype=torch.int32, device=device)
    own_lengths = torch.full((1,), shape.own, dtype=torch.int32, device=device)
    return q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths


def repeated(layer):
    """The same for SDPA: keys and values of every sample one after the other."""
    q, prompt_k, prompt_v, _, own_k, own_v, _ = layer
    P, G = q.shape[:2]
    whole = (
        torch.cat([a[:, None].expand(-1, G, -1, -1, -1), b], 3).flatten(0, 1)
        for a, b in ((prompt_k, own_k), (prompt_v, own_v))
    )
    return q.reshape(P * G, q.shape[2], 1, -1), *whole


def captured(run, layers, device):
    """All layers as one graph, to be replayed; on a CPU one after the other."""

    def whole():
        return [run(layer) for layer in layers]

    if device == "cpu":
        return whole
    run(layers[0])  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = whole()

    def replay():
        graph.replay()
        return out

    return replay


def rows(mode):
    shape = SMALL if mode == "dry" else Shape()
    what = (
        f"decode attention, {shape.layers} layers: {shape.samples} samples, G = {shape.G}, H = {shape.H}, H_kv = "
        f"{shape.H_kv}, d = {shape.d}, prompts of {shape.prompt:,} tokens, {shape.own} own, bfloat16"
    )
    if mode == "cpu":
        return []
    return [
        Row(
            what=what,
            against="SDPA on keys and values repeated for each sample",
            make=partial(sides, shape, device_of(mode)),
        )
    ]


def sides(shape, device):
    layers = [draw(shape, device) for _ in range(shape.layers)]

    def peer():
        plain = [repeated(layer) for layer in layers]
        return captured(
            lambda layer: F.scaled_dot_product_attention(*layer, scale=shape.scale, enable_gqa=True), plain, device
        )

    prepared = []

    def theirs():
        prepared or prepared.append(peer())
        return prepared[0]()

    def check(mine, theirs):
        for a, b in zip(mine, theirs or ()):
            assert (a.flatten().float() - b.flatten().float()).abs().max() <= 2e-2

    return Sides(
        ours=captured(lambda layer: ops.decode_attention(*layer, shape.scale), layers, device),
        peer=theirs,
        check=check,
        # read and written once: queries and output, each prompt's and each sample's keys and values
        bytes=sum(x.nbytes for q, k, v, _, own_k, own_v, _ in layers for x in (q, k, v, own_k, own_v, q)),
    )
