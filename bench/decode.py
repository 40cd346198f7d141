"""One decode step's attention at the 3B model's shape: the kernel against plain SDPA on keys and values repeated for each sample.

Both sides run several layers, each with a cache of its own, as one captured graph: their times hold no launch from Python and
find nothing in the chip's cache that a real step wouldn't.
"""

import torch
import torch.nn.functional as F

from sslr1 import ops

SAMPLES, G, H, H_KV, D = 512, 16, 16, 2, 128
PROMPT, OWN, LAYERS = 1000, 200, 8
SCALE = D**-0.5


def draw_layer(device, samples=SAMPLES, prompt=PROMPT, own=OWN, dtype=torch.bfloat16):
    """Arguments of `ops.decode_attention`, and of SDPA: keys and values of every sample one behind the other."""
    P = samples // G
    q = torch.randn(P, G, H, D, device=device, dtype=dtype)
    prompt_k, prompt_v = torch.randn(2, P, H_KV, prompt, D, device=device, dtype=dtype)
    own_k, own_v = torch.randn(2, P, G, H_KV, own, D, device=device, dtype=dtype)
    prompt_lengths = torch.full((P,), prompt, dtype=torch.int32, device=device)
    own_lengths = torch.full((1,), own, dtype=torch.int32, device=device)
    whole = (
        torch.cat([a[:, None].expand(-1, G, -1, -1, -1), b], 3).flatten(0, 1)
        for a, b in ((prompt_k, own_k), (prompt_v, own_v))
    )
    return (q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths), (q.view(samples, H, 1, D), *whole)


def ours(layer):
    return ops.decode_attention(*layer[0], SCALE)


def plain(layer):
    return F.scaled_dot_product_attention(*layer[1], scale=SCALE, enable_gqa=True)


def bytes_moved(layer):
    """What has to be read and written once: queries, each prompt's and each sample's keys and values, the output."""
    q, prompt_k, prompt_v, _, own_k, own_v, _ = layer[0]
    return sum(x.numel() * x.element_size() for x in (q, prompt_k, prompt_v, own_k, own_v, q))


def captured(run, layers):
    """All layers as one graph, to be replayed."""
    for layer in layers[:1]:  # compiled before the capture
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer)
    return graph.replay


def rows():
    row = {
        "what": f"decode attention, {LAYERS} layers: {SAMPLES} samples, G = {G}, H = {H}, H_kv = {H_KV}, d = {D}, prompts of "
        f"{PROMPT:,} tokens, {OWN} own, bfloat16",
        "against": "SDPA on keys and values repeated for each sample",
        "goal": "",
    }
    if not torch.cuda.is_available():
        yield {**row, "ours": None, "peer": None, "why_not": "needs a GPU"}
        return
    layers = [draw_layer("cuda") for _ in range(LAYERS)]
    difference = ours(layers[0]).view(SAMPLES, H, 1, D).float() - plain(layers[0]).float()
    assert difference.abs().max() <= 2e-2
    yield {
        **row,
        "ours": captured(ours, layers),
        "peer": captured(plain, layers),
        "bytes": sum(map(bytes_moved, layers)),
        "device": "cuda",
    }
