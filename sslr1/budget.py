"""`python -m sslr1.train CONFIG --plan RANKS`: memory and communication of each GPU, by arithmetic, without starting anything.

What is exact (weights, gradients, moments, replica, logits, caches) follows from the model's shapes; activations are an
estimate of what autograd keeps, and say so.
"""

from dataclasses import dataclass

from sslr1 import model, ops
from sslr1.config import Config
from sslr1.ops.grpo_loss import default_height

MASTER = 4  # bytes of a parameter and a reduced gradient
TEXT = 200  # tokens of a question beside its pictures


@dataclass
class Line:
    """what, GB on each GPU, how it comes about, and when it is there: always, or in the learner or the rollout only."""

    what: str
    gb: float
    how: str
    when: str = "always"


def plan(config: Config, path, ranks: int, device="cuda") -> tuple[list, list]:
    """(memory lines, communication lines) of one rank. path: the model folder. Raises UserError as loading does."""
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
    width = getattr(text, "head_dim", None) or D // text.num_attention_heads
    heads = text.num_key_value_heads * width
    rows = min(config.rollout.wave_rows, config.rollout.prompts // ranks * config.rollout.group_size)
    per_token = 2 * layers * heads * dtype
    kept = activations(text, width, hasattr(inner.language_model.layers[0].self_attn, "q_norm"), dtype)
    again = config.train.recompute
    kept_layers = layers - (-(-layers // again) if again else 0)
    act = config.train.token_budget * (kept_layers * kept + (layers - kept_layers) * D * dtype + (kept if again else 0))
    moment = 2 if config.optim.moments == "bfloat16" else 4
    shared = ranks == 1 and dtype == MASTER
    memory = [
        Line("weights", sum(every) * MASTER, f"{sum(every):,} parameters x {MASTER} bytes / {shards} shards"),
        Line("gradients", trained * MASTER, f"{trained:,} trained x {MASTER} bytes / {shards} shards", "learner"),
        Line("AdamW's moments", 2 * trained * moment, f"twice {moment} bytes a trained parameter / {shards} shards"),
    ]
    for line in memory:
        line.gb /= shards
    memory += [
        Line("sampler's weights", 0 if shared else sum(every) * dtype, "the learner's own" if shared else f"whole, {dtype} bytes each"),
        Line("gathered weights", 0 if shards == 1 and dtype == MASTER else (rest + 2 * max(blocks)) * dtype, "embeddings and head, two layers", "learner"),
        Line("whole gradients", (rest + max(blocks)) * MASTER, "embeddings and head, one layer, before they are reduced", "learner"),
        Line("loss", height * V * (4 + (dtype if dtype == 2 else 0)) + 4 * V * D, f"logits of {height:,} rows, the head's gradient", "learner"),
        Line("activations (estimate)", act, f"{config.train.token_budget:,} tokens x {layers} layers" + (f", every {again}. recomputed" if again else ""), "learner"),
        Line("rollout's cache", rows * config.rollout.max_tokens * per_token + rows / config.rollout.group_size * prompt * per_token,
             f"{rows} samples x {config.rollout.max_tokens} tokens, prompts of about {prompt}", "rollout"),
    ]  # fmt: skip
    share = (shards - 1) / shards
    traffic = [
        Line("weights gathered, a micro-batch", 2 * sum(every) * dtype * share, "once forward, once backward"),
        Line("gradients reduced, a step", trained * MASTER * share, "behind the last micro-batch"),
        Line("gradients between copies, a step", trained * MASTER / shards * (config.train.replicate > 1), "HSDP"),
        Line("sampler refreshed, a step", 0 if shared else sum(every) * MASTER * share, "whole weights, one by one"),
    ]
    for line in [*memory, *traffic]:
        line.gb /= 1e9
    return memory, traffic


def activations(text, width, head_norms, dtype) -> float:
    """Bytes a token that a decoder layer keeps for its backward pass: two norms in float32 with their inputs, queries, keys,
    values, the attention's output, and three of the MLP's width. width: of a head; head_norms: queries and keys are
    normalised too."""
    D, q, kv = text.hidden_size, text.num_attention_heads * width, text.num_key_value_heads * width
    norms = 2 * D + head_norms * (q + kv)
    return norms * 4 + (3 * D + 2 * q + 2 * kv + 4 * text.intermediate_size) * dtype


def peak(memory) -> float:
    """GB at most: what is always there, and the larger of what learner and rollout take in turn."""
    of = {when: sum(line.gb for line in memory if line.when == when) for when in ("always", "learner", "rollout")}
    return of["always"] + max(of["learner"], of["rollout"])


def report(config: Config, path, ranks: int) -> str:
    memory, traffic = plan(config, path, ranks)
    lines = [
        f"{ranks} GPU(s), {config.train.replicate} cop{'y' if config.train.replicate == 1 else 'ies'} of the model; GB on each:"
    ]
    for title, found in (("memory", memory), ("sent and received", traffic)):
        lines += ["", title, *(f"  {line.gb:9.2f}  {line.what}: {line.how}" for line in found if line.gb)]
        if title == "memory":
            lines.append(f"  {peak(found):9.2f}  at most: learner and rollout take turns")
    return "\n".join(lines)
