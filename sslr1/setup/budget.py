"""`python -m sslr1.train CONFIG --plan RANKS`: memory and communication of each GPU, by arithmetic, without starting anything.

What is exact (weights, gradients, moments, replica, logits, caches) follows from the model's shapes; activations are an
estimate of what autograd keeps, and say so.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface

from sslr1 import model, ops
from sslr1.model import shared_prefix
from sslr1.ops.chunks import default_height
from sslr1.rollout.cache import bytes_a_token, logit_bytes, places_for
from sslr1.sums import plain_sum

MASTER = 4  # bytes of a parameter and a reduced gradient
TEXT = 200  # tokens of a question beside its pictures


@dataclass
class Line:
    """what, GB on each GPU, how it comes about, and when it is there: always, in the learner or the rollout only, or in one part of
    the learner's turn: "forward" to the loss, or "reduce", at the end of the backward pass, when the others are gone."""

    what: str
    gb: float
    how: str
    when: str = "always"


def plan(config, path, ranks: int, device="cuda") -> tuple[list, list]:
    """(memory lines, communication lines) of one rank. config: a Config, or what has its values; path: the model folder. Raises UserError as loading does."""
    network = model.skeleton(path)
    model.freeze(network, config.model.frozen)
    dtype = 4 if config.model.dtype == "float32" or (config.model.dtype == "auto" and device == "cpu") else 2
    every = [p.numel() for p in network.parameters()]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    shards = ranks // config.train.replicate
    text = network.config.text_config
    D, V, layers = text.hidden_size, text.vocab_size, text.num_hidden_layers
    inner = network.model
    blocks = [sum(p.numel() for p in b.parameters()) for b in [*inner.visual.blocks, *inner.language_model.layers]]
    rest = sum(every) - sum(blocks)  # embeddings, head and norms: whole during the whole forward and backward
    height = default_height(config.train.token_budget, D, device)
    spec = ops.PatchSpec.from_pretrained(path)
    prompt = round((config.data.max_side or 1024) / spec.unit) ** 2 + TEXT
    r = config.rollout
    groups = places_for(r.prompts // ranks, r.group_size, r.wave_rows, r.wave_groups)
    rows = min(groups, max(1, r.wave_rows // r.group_size)) * r.group_size
    kept_tokens = groups * (prompt + r.group_size * r.max_tokens)
    moment = 2 if config.optim.moments == "bfloat16" else 4
    shared = ranks == 1 and dtype == MASTER
    tokens, again = config.train.token_budget, config.train.recompute
    patches = round(tokens * (1 - TEXT / prompt) * spec.merge**2)
    of_token, of_patch = activations(network, torch.float32 if dtype == 4 else torch.bfloat16)
    towers = (
        (tokens, layers, of_token, D),
        (patches, len(inner.visual.blocks), of_patch, inner.visual.config.hidden_size),
    )
    act = 0
    for count, depth, kept, entry in towers:
        # of these only the input stays, and one is whole again
        recomputed = -(-depth // again) if again and kept else 0
        act += count * ((depth - recomputed + (recomputed > 0)) * kept + recomputed * entry * dtype)

    def reduced(count):
        """Of a group of parameters: gradients as autograd gives them, or their float32 sum, beside FSDP2's input."""
        return count * (MASTER + max(dtype, MASTER / shards))

    memory = [
        Line("weights", sum(every) * MASTER, f"{sum(every):,} parameters x {MASTER} bytes / {shards} shards"),
        Line("gradients", trained * MASTER, f"{trained:,} trained x {MASTER} bytes / {shards} shards", "learner"),
        Line("AdamW's moments", 2 * trained * moment, f"twice {moment} bytes a trained parameter / {shards} shards"),
    ]
    for line in memory:
        line.gb /= shards
    if config.loss.kl_coef:
        memory.append(
            Line("reference's weights", sum(every) * dtype / shards, f"frozen, {dtype} bytes each / {shards} shards")
        )
    memory += [
        Line("sampler's weights", 0 if shared else sum(every) * dtype, "the learner's own" if shared else f"whole, {dtype} bytes each"),
        Line("gathered weights", 0 if shards == 1 and dtype == MASTER else (rest + 2 * max(blocks)) * dtype, "embeddings and head, two layers", "learner"),
        Line("whole gradients", reduced(max(blocks)) + max(blocks) * MASTER, "two layers, while they are reduced", "learner"),
        Line("whole gradients of the rest", reduced(rest), "embeddings and head, when activations are gone", "reduce"),
        Line("loss", (height + D) * V * (MASTER + (dtype if dtype == 2 else 0)), f"logits of {height:,} rows, the head's gradient", "forward"),
        Line("activations (estimate)", act, f"{tokens:,} tokens x {layers} layers, {patches:,} patches x {len(inner.visual.blocks)} blocks" + (f", every {again}. recomputed" if again else ""), "forward"),
        Line("rollout's cache", kept_tokens * bytes_a_token(text, dtype),
             f"{groups * r.group_size} samples x {r.max_tokens} tokens, {groups} prompts of about {prompt}", "rollout"),
        Line("rollout's logits", logit_bytes(text, rows), f"{rows} samples, twice", "rollout"),
    ]  # fmt: skip
    share = (shards - 1) / shards
    traffic = [
        Line("weights gathered, a micro-batch", 2 * sum(every) * dtype * share, "once forward, once backward"),
        Line(
            "reference's weights gathered, a micro-batch",
            bool(config.loss.kl_coef) * sum(every) * dtype * share,
            "once forward",
        ),
        Line("gradients reduced, a micro-batch", trained * MASTER * share, "once backward"),
        Line("gradients between copies, an update", trained * MASTER / shards * (config.train.replicate > 1), "HSDP"),
        Line("sampler refreshed, a step", 0 if shared else sum(every) * MASTER * share, "whole weights, one by one"),
    ]
    for line in [*memory, *traffic]:
        line.gb /= 1e9
    return memory, traffic


def activations(network, dtype) -> tuple[float, float]:
    """Bytes that a decoder layer keeps for its backward pass a token, and a vision block a patch: 0 for a frozen one.

    Both towers run on the meta device, and what autograd saves is counted; attention as flash kernels have it, which keep
    queries, keys, values and their output. network: a `model.skeleton`, which is altered.
    """
    network.to("meta", dtype)
    visual, language = network.model.visual, network.model.language_model
    for part in (visual, language):
        part.config._attn_implementation_internal = ATTENTION
    grid = torch.tensor([[1, 16, 16]])
    patches = torch.empty(256, visual.patch_embed.proj.weight[0].numel(), dtype=dtype, device="meta")
    embeds = torch.empty(1, 256, network.config.text_config.hidden_size, dtype=dtype, device="meta")
    with kept_bytes(network) as of_patches:
        visual(patches, grid_thw=grid, **shared_prefix.vision_tables(visual, grid, "meta"))
    with kept_bytes(network) as of_tokens:
        language(
            inputs_embeds=embeds.requires_grad_(),
            position_ids=torch.empty(3, 1, 256, dtype=torch.int64, device="meta"),
            attention_mask=shared_prefix.no_mask(embeds),
            use_cache=False,
        )
    return sum(of_tokens.values()) / 256 / len(language.layers), sum(of_patches.values()) / 256 / len(visual.blocks)


@contextmanager
def kept_bytes(model):
    """Collect, inside, the bytes of each storage that autograd saves tensors in, but the model's parameters'."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # or another could take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q.transpose(1, 2))
        ctx.save_for_backward(q, k, v, out)
        return out


ATTENTION = "sslr1_flash_plan"  # with "flash" in its name, as VISION_ATTENTION
AttentionInterface.register(ATTENTION, lambda module, q, k, v, *_, **__: (_Attention.apply(q, k, v), None))


def peak(memory) -> float:
    """GB at most: what is always there, and the larger of what learner and rollout take in turn. Without what CUDA, NCCL and cuBLAS
    keep for themselves, and what torch's allocator has but can't hand out."""
    times = ("always", "learner", "forward", "reduce", "rollout")
    of = {when: plain_sum(line.gb for line in memory if line.when == when) for when in times}
    return of["always"] + max(of["learner"] + max(of["forward"], of["reduce"]), of["rollout"])


def report(config, path, ranks: int) -> str:
    memory, traffic = plan(config, path, ranks)
    lines = [
        f"{ranks} GPU(s), {config.train.replicate} cop{'y' if config.train.replicate == 1 else 'ies'} of the model; GB on each:"
    ]
    for title, found in (("memory", memory), ("sent and received", traffic)):
        lines += ["", title, *(f"  {line.gb:9.2f}  {line.what}: {line.how}" for line in found if line.gb)]
        if title == "memory":
            lines.append(f"  {peak(found):9.2f}  at most: learner and rollout take turns")
    return "\n".join(lines)
